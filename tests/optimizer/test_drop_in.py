"""FIPOptimizer under torch's own optimizer cases.

These are the cases of pytorch's ``test/test_optim.py`` (class ``TestOptimRenewed``), run through the
machinery in the wheel (``OptimizerInfo``, ``optims``, ``instantiate_device_type_tests``). A method
here has the name of the case it answers to; `NOT_OURS` lists the cases without one, with the reason.

Two habits of torch's cases contradict our definition, and are asserted the other way round:

* Gradients that are None make no step there. Here no gradient at all means L = 0, and Eq. 4 then
  prescribes a step of length eps along the null space of the metric
  (`test_no_gradient_at_all_is_the_free_path`). Parameters without a gradient beside others with one
  are skipped, as in torch; zero gradients and frozen parameters make no step, as in torch.
* Their closures may return a loss without calling backward. Here such a closure raises
  (`test_closure_without_backward_raises`), so the cases below call `step` without it.
"""

# ruff: noqa: PT009, PT027 (torch's TestCase compares tensors and nests of them)

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from drop_in_harness import BareFIPOptimizer
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_device_type import instantiate_device_type_tests, onlyCUDA
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize

from fipoptim import Solver

# Every case of TestOptimRenewed that has no method of its name in TestDropIn, and why.
NO_SUCH_OPTION = "FIPOptimizer has no foreach, fused, capturable or differentiable implementation"
NOT_OURS = {
    # The design excludes what these cases test.
    "test_complex": "complex parameters raise: see test_errors",
    "test_complex_2d": "complex parameters raise: see test_errors",
    "test_rosenbrock_sparse": "sparse parameters and gradients raise: see test_errors",
    "test_param_groups_weight_decay": "there is no weight_decay; an objective of its own is the way",
    # These cases compare several implementations of one optimizer.
    "test_foreach_matches_forloop": NO_SUCH_OPTION,
    "test_mixed_device_dtype": NO_SUCH_OPTION,
    "test_set_default_dtype_works_with_foreach": NO_SUCH_OPTION,
    "test_foreach_large_tensor": NO_SUCH_OPTION,
    "test_peak_memory_foreach": NO_SUCH_OPTION,
    "test_defaults_changed_to_foreach": NO_SUCH_OPTION,
    "test_fused_matches_forloop": NO_SUCH_OPTION,
    "test_fused_error_on_params_on_meta": NO_SUCH_OPTION,
    "test_fused_large_tensor": NO_SUCH_OPTION,
    "test_fused_does_not_step_if_foundinf": NO_SUCH_OPTION,
    "test_fused_cpu_matches_cuda": NO_SUCH_OPTION,
    "test_cpu_load_state_dict": NO_SUCH_OPTION,
    "test_forloop_goes_right_direction_multigpu": "the anchors' model lives on one device",
}
TORCH_CASES = {
    *NOT_OURS,
    "test_can_load_from_to_named_state_dict",
    "test_can_load_older_state_dict",
    "test_deepcopy_copies_all_public_attrs",
    "test_errors",
    "test_forloop_goes_right_direction",
    "test_load_nontensor_step",
    "test_load_state_dict_post_hook",
    "test_load_state_dict_pre_hook_and_prepend",
    "test_load_state_dict_pre_post_hook",
    "test_non_empty_state",
    "test_optim_infos_do_not_specify_global_cliquey_kwargs",
    "test_optimizer_can_be_printed",
    "test_param_group_with_lrscheduler_goes_right_direction",
    "test_param_groups_lr",
    "test_save_load_equality_with_weights_only",
    "test_second_order_optims_return_consistent_types",
    "test_state_dict_deterministic",
    "test_state_dict_post_hook",
    "test_state_dict_pre_hook",
    "test_state_dict_pre_post_hook",
    "test_state_dict_with_cuda_params",
    "test_step_all_hooks",
    "test_step_is_noop_for_zero_grads",
    "test_step_is_noop_when_params_have_no_grad",
    "test_step_post_hook",
    "test_step_pre_hook",
    "test_tensor_lr",
}


def optim_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """The configurations that torch's cases run through; fresh objects at every call."""
    configurations: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 1e-3},
        "Tensor lr": {"lr": torch.tensor(1e-3)},
        "large beta": {"beta": 10.0},
        "momentum": {"momentum": 0.9},
        "the paper's equation to the letter": {"drift_correction": False},
        "drift budget": {"max_drift": 0.5},
        "Adam's geometry": {"precondition": "adam"},
        "Adam's geometry and momentum": {"precondition": "adam", "momentum": 0.9},
        "Muon's geometry": {"precondition": "muon"},
        "Muon's geometry and momentum": {"precondition": "muon", "momentum": 0.9},
        "exact": {"solver": Solver(products=8)},
        "output ball": {"solver": Solver(radius=0.05)},
        "seeded": {"generator": torch.Generator().manual_seed(1)},
    }
    return [OptimizerInput(None, kwargs, desc) for desc, kwargs in configurations.items()]


def optim_error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    """torch's errors common to all optimizers, and ours."""

    def parameter(**grad: Tensor) -> Parameter:
        p = Parameter(torch.ones(2, 2, device=device, dtype=dtype))
        if grad:
            p.grad = grad["grad"]
        return p

    def bad(
        desc: str,
        error: type[Exception],
        regex: str,
        *,
        params: Any = None,
        on: OptimizerErrorEnum = OptimizerErrorEnum.CONSTRUCTION_ERROR,
        **kwargs: Any,
    ) -> ErrorOptimizerInput:
        params = [parameter()] if params is None else params
        return ErrorOptimizerInput(
            OptimizerInput(params, kwargs, desc), error_on=on, error_type=error, error_regex=regex
        )

    errors = []
    for error in get_error_inputs_for_all_optims(device, dtype):
        # The message names eps, which is the argument of our constructor. The rest of the case is torch's.
        if error.error_regex == "Tensor lr must be 1-element":
            error.error_regex = r"eps.*(1-element|one element|number)"
            error.optimizer_error_input.params = [parameter()]
        errors.append(error)

    nan, inf = math.nan, math.inf
    for name, values in {
        "eps": (-0.5, nan, inf),
        "beta": (-0.5, nan, inf),
        "momentum": (-0.5, 1.5, nan),
        "max_drift": (-0.5, nan),
    }.items():
        errors += [
            bad(f"{name}={value}", ValueError, f"(?s){name}.*{value}", **{name: value})
            for value in values
        ]
    for name, values in {"lr": (-0.5, nan), "beta": (-0.5, nan), "momentum": (-0.5, nan)}.items():
        errors += [
            bad(
                f"group {name}={value}",
                ValueError,
                name,
                params=[{"params": parameter(), name: value}],
            )
            for value in values
        ]
    integers = Parameter(torch.ones(2, dtype=torch.int64, device=device), requires_grad=False)
    complexes = Parameter(torch.ones(2, dtype=torch.complex64, device=device))
    sparse = torch.eye(2, device=device, dtype=dtype).to_sparse().requires_grad_()
    step = OptimizerErrorEnum.STEP_ERROR
    return [
        *errors,
        bad("no parameters", ValueError, "empty parameter list", params=[]),
        bad("not tensors", TypeError, "can only optimize Tensors", params=["weight"]),
        bad("non-leaf", ValueError, "non-leaf", params=[parameter() * 2]),
        bad("text eps", (TypeError, ValueError), "eps", eps="0.1"),
        bad("unknown geometry", ValueError, "(?s)precondition.*sgd", precondition="sgd"),
        bad("solver by name", (TypeError, ValueError), "solver", solver="adaptive"),
        bad("integer parameter", (TypeError, ValueError), "int64", params=[parameter(), integers]),
        bad("complex parameter", (TypeError, ValueError), "complex64", params=[complexes]),
        bad("sparse parameter", (TypeError, ValueError), "sparse", params=[parameter(), sparse]),
        bad(
            "sparse gradient",
            (TypeError, ValueError, RuntimeError),
            "sparse",
            params=[parameter(grad=torch.eye(2, device=device, dtype=dtype).to_sparse())],
            on=step,
        ),
        bad(
            "NaN in the gradient",
            (ValueError, RuntimeError),
            "(?i)nan|finite",
            params=[
                parameter(),
                parameter(grad=torch.full((2, 2), nan, device=device, dtype=dtype)),
            ],
            on=step,
        ),
    ]


FIP = OptimizerInfo(
    BareFIPOptimizer,
    optim_inputs_func=optim_inputs,
    optim_error_inputs_func=optim_error_inputs,
    scheduler_inputs=(
        [lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10)],
        [
            lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, end_factor=1, total_iters=4),
            lambda opt: ReduceLROnPlateau(opt),
        ],
        [
            lambda opt: lr_scheduler.StepLR(opt, gamma=0.99, step_size=10),
            lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.99),
            lambda opt: ReduceLROnPlateau(opt),
        ],
        [
            lambda opt: lr_scheduler.ConstantLR(opt, factor=0.4, total_iters=4),
            lambda opt: lr_scheduler.PolynomialLR(opt, power=0.9, total_iters=40),
        ],
    ),
    supported_impls=(),
    not_og_supported_flags=(),
    supports_complex=False,
    supports_multiple_devices=False,
)


def all_inputs(device: Any, dtype: Any, info: OptimizerInfo) -> list[OptimizerInput]:
    return _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info)


def linear_problem(device: Any, dtype: Any, contiguous: bool = True) -> tuple[Any, Any, Tensor]:
    """A weight, a bias and an input: torch's usual ``(W x + b)²``."""
    if contiguous:
        weight = Parameter(torch.randn(10, 5, device=device, dtype=dtype))
        bias = Parameter(torch.randn(10, device=device, dtype=dtype))
    else:
        weight = Parameter(torch.randn(10, 5, 2, device=device, dtype=dtype)[..., 0])
        bias = Parameter(torch.randn(10, 2, device=device, dtype=dtype)[..., 0])
    return weight, bias, torch.randn(5, device=device, dtype=dtype)


def squares(optimizer: Optimizer, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = (weight.mv(x) + bias).square().sum()
    loss.backward()
    return loss


def step_schedulers(schedulers: list[Any], loss: Tensor) -> None:
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss.item())
        else:
            scheduler.step()


def continue_from(optimizer: BareFIPOptimizer, params: Any, **kwargs: Any) -> BareFIPOptimizer:
    """Another optimizer over `params`, brought to the state of `optimizer` as a checkpoint would."""
    other = BareFIPOptimizer(params, **kwargs)
    other.anchors.load_state_dict(copy.deepcopy(optimizer.anchors.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def named(params: list[Tensor], names: bool) -> list[Any]:
    return [(f"name{i}", p) for i, p in enumerate(params)] if names else params


def without_names(state: dict[str, Any]) -> dict[str, Any]:
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group.pop("param_names", None)
    return state


def set_lr_in_place(opt: Optimizer, state: dict[str, Any]) -> None:
    state["param_groups"][0]["lr"] = 0.002


def replace_lr(opt: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    state = copy.deepcopy(state)
    state["param_groups"][0]["lr"] = 0.003
    return state


class TestDropIn(TestCase):
    """Each method answers to the case of its name in torch's TestOptimRenewed."""

    @optims([FIP])
    def test_optim_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        for case in optim_info.optim_inputs_func(device=device):
            self.assertFalse({"foreach", "fused", "differentiable"} & case.kwargs.keys())

    @optims([FIP])
    def test_errors(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            case = error.optimizer_error_input
            kinds = error.error_type if isinstance(error.error_type, tuple) else (error.error_type,)
            with self.subTest(case.desc):
                if issubclass(kinds[0], Warning):
                    with self.assertWarnsRegex(kinds, error.error_regex):
                        optim_info.optim_cls(case.params, **case.kwargs)
                elif error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
                    with self.assertRaisesRegex(kinds, error.error_regex):
                        optim_info.optim_cls(case.params, **case.kwargs)
                else:
                    optimizer = optim_info.optim_cls(case.params, **case.kwargs)
                    before = [p.detach().clone() for p in case.params]
                    with self.assertRaisesRegex(kinds, error.error_regex):
                        optimizer.step()
                    self.assertEqual(before, [p.detach() for p in case.params], rtol=0, atol=0)

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @optims([FIP])
    def test_forloop_goes_right_direction(
        self, device, dtype, optim_info, contiguous, with_lrsched
    ):
        for makers in optim_info.scheduler_inputs if with_lrsched else [[]]:
            for case in optim_info.optim_inputs_func(device=device):
                problem = linear_problem(device, dtype, contiguous)
                strides = problem[0].stride(), problem[1].stride()
                optimizer = optim_info.optim_cls(list(problem[:2]), **case.kwargs)
                schedulers = [make(optimizer) for make in makers]
                start = squares(optimizer, *problem).item()
                for _ in range(10):
                    loss = squares(optimizer, *problem)
                    optimizer.step()
                    step_schedulers(schedulers, loss)
                self.assertLess(squares(optimizer, *problem).item(), start, case.desc)
                self.assertEqual((problem[0].stride(), problem[1].stride()), strides)

    @optims([FIP])
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        for makers in optim_info.scheduler_inputs:
            weight, bias, x = linear_problem(device, dtype)
            groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
            optimizer = optim_info.optim_cls(groups)
            schedulers = [make(optimizer) for make in makers]
            closure = functools.partial(squares, optimizer, weight, bias, x)
            start = closure().item()
            for _ in range(20):
                step_schedulers(schedulers, optimizer.step(closure))
            self.assertLess(closure().item(), start)

    @optims([FIP])
    def test_tensor_lr(self, device, dtype, optim_info):
        shapes = (), (1,)
        for case, shape in itertools.product(all_inputs(device, dtype, optim_info), shapes):
            weight, bias, x = linear_problem(device, dtype)
            weight_c, bias_c = copy.deepcopy((weight, bias))
            kwargs = {**case.kwargs, "lr": 1e-3}
            kwargs_c = copy.deepcopy(kwargs) | {"lr": torch.full(shape, 1e-3, dtype=torch.float64)}
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            optimizer_c = optim_info.optim_cls([weight_c, bias_c], **kwargs_c)
            for _ in range(5):
                squares(optimizer, weight, bias, x)
                optimizer.step()
                squares(optimizer_c, weight_c, bias_c, x)
                optimizer_c.step()
                self.assertEqual([weight, bias], [weight_c, bias_c], case.desc)

    @optims([FIP])
    def test_param_groups_lr(self, device, dtype, optim_info):
        # 1e-28 squared is below the smallest float32, and its inverse is above the largest.
        for case, outer in itertools.product(all_inputs(device, dtype, optim_info), (1e-28, 0.0)):
            kwargs = {**case.kwargs}
            shared = {k: kwargs.pop(k) for k in list(kwargs) if k not in ("lr", "beta", "momentum")}
            kwargs.setdefault("lr", 1e-3)
            weight, bias, x = linear_problem(device, dtype)
            still = Parameter(torch.randn(2, device=device, dtype=dtype))
            before = still.detach().clone()
            groups = [{"params": [weight, bias], **kwargs}, {"params": [still]}]
            if outer == 0.0:
                groups[1]["lr"], outer = 0.0, 1e-3
            optimizer = optim_info.optim_cls(groups, lr=outer, **shared)
            start = squares(optimizer, weight, bias, x).item()
            for _ in range(20):
                loss = squares(optimizer, weight, bias, x)
                still.grad = torch.rand_like(still)
                optimizer.step()
            self.assertLess(loss.item(), start, case.desc)
            self.assertEqual(still.detach(), before, rtol=0, atol=0)

    @optims([FIP])
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for case in all_inputs(device, dtype, optim_info):
            params = list(linear_problem(device, dtype)[:2])
            text = repr(optim_info.optim_cls(params, **case.kwargs))
            self.assertIn("lr", text)

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims([FIP])
    def test_state_dict_deterministic(
        self, device, dtype, optim_info, is_named_optim0, is_named_optim1
    ):
        for case in all_inputs(device, dtype, optim_info):
            weight, bias, x = linear_problem(device, dtype)
            optimizer = optim_info.optim_cls(named([weight, bias], is_named_optim0), **case.kwargs)
            for _ in range(4):
                squares(optimizer, weight, bias, x)
                optimizer.step()
            weight_c, bias_c = copy.deepcopy((weight, bias))
            optimizer_c = continue_from(
                optimizer, named([weight_c, bias_c], is_named_optim1), **case.kwargs
            )
            for _ in range(4):
                squares(optimizer, weight, bias, x)
                optimizer.step()
                squares(optimizer_c, weight_c, bias_c, x)
                optimizer_c.step()
                self.assertEqual([weight, bias], [weight_c, bias_c], rtol=0, atol=0)
            states = [without_names(o.state_dict()) for o in (optimizer, optimizer_c)]
            self.assertEqual(*states, rtol=0, atol=0)
            optimizer_c.param_groups.extend(optimizer_c.param_groups)
            repeated = without_names(optimizer_c.state_dict())["param_groups"][-1]
            self.assertEqual(repeated, states[0]["param_groups"][-1])

    def _conv_steps(self, optimizer, model, x, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    def _conv(self, device, dtype):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))
        return model.to(device, dtype), torch.rand(1, 4, 16, 16, device=device, dtype=dtype)

    @optims([FIP])
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        # There is no older version, so no entry of the state can be missing.
        for case in all_inputs(device, dtype, optim_info):
            model, x = self._conv(device, dtype)
            optimizer = optim_info.optim_cls(model.parameters(), **case.kwargs)
            self._conv_steps(optimizer, model, x, 3)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            self._conv_steps(optimizer, model, x, 1)

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims([FIP])
    def test_can_load_from_to_named_state_dict(
        self, device, dtype, optim_info, is_named_optim0, is_named_optim1
    ):
        for case in all_inputs(device, dtype, optim_info):
            model, x = self._conv(device, dtype)
            first = model.named_parameters() if is_named_optim0 else model.parameters()
            optimizer = optim_info.optim_cls(first, **case.kwargs)
            self._conv_steps(optimizer, model, x, 3)
            second = model.named_parameters() if is_named_optim1 else model.parameters()
            optimizer2 = optim_info.optim_cls(second, **case.kwargs)
            # The state of the anchors is loaded first, because they were made on the network as it is now.
            optimizer2.anchors.load_state_dict(optimizer.anchors.state_dict())
            optimizer2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            self._conv_steps(optimizer2, model, x, 1)
            names = optimizer2.state_dict()["param_groups"][0].get("param_names")
            expected = ["0.weight", "0.bias", "1.weight", "1.bias"]
            self.assertEqual(names, expected if is_named_optim0 or is_named_optim1 else None)

    @parametrize("is_named_optim", [True, False])
    @optims([FIP], dtypes=[torch.float32, torch.float64])
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info, is_named_optim):
        for case in all_inputs(device, dtype, optim_info):
            weight, bias, x = linear_problem(device, dtype)
            params = named([weight, bias], is_named_optim)
            optimizer = optim_info.optim_cls(params, **case.kwargs)
            for _ in range(3):
                optimizer.step(functools.partial(squares, optimizer, weight, bias, x))
            state = optimizer.state_dict()
            # Distributed checkpointing takes per-parameter state only.
            self.assertTrue(all(isinstance(key, int) for key in state["state"]), case.desc)
            file = io.BytesIO()
            torch.save(state, file)
            for weights_only in (False, True):
                file.seek(0)
                loaded = torch.load(file, weights_only=weights_only)
                self.assertEqual(loaded, state)
            # Loading casts entries that are not protected from it, and must not change any.
            optimizer.load_state_dict(loaded)
            self.assertEqual(optimizer.state_dict(), loaded, rtol=0, atol=0)

    @optims([FIP])
    def test_load_nontensor_step(self, device, dtype, optim_info):
        for case in all_inputs(device, dtype, optim_info):
            weight, bias, x = linear_problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **case.kwargs)
            for _ in range(3):
                squares(optimizer, weight, bias, x)
                optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
            for entry in state["state"].values():
                if torch.is_tensor(entry.get("step")):
                    entry["step"] = entry["step"].item()
            optimizer.load_state_dict(state)
            optimizer.step()

    @onlyCUDA
    @optims([FIP])
    def test_state_dict_with_cuda_params(self, device, dtype, optim_info):
        for case in all_inputs("cpu", dtype, optim_info):
            weight, bias, x = linear_problem("cpu", dtype)
            optimizer = optim_info.optim_cls([weight, bias], **case.kwargs)
            squares(optimizer, weight, bias, x)
            optimizer.step()
            there = [Parameter(p.detach().to(device)) for p in (weight, bias)]
            optimizer_c = continue_from(optimizer, there, **case.kwargs)
            for _ in range(3):
                squares(optimizer, weight, bias, x)
                optimizer.step()
                squares(optimizer_c, *there, x.to(device))
                optimizer_c.step()
                self.assertEqual([weight, bias], there, exact_device=False, rtol=1e-3, atol=1e-4)

    def _fresh(self, device, dtype, optim_info) -> Iterator[BareFIPOptimizer]:
        for case in all_inputs(device, dtype, optim_info):
            yield optim_info.optim_cls(list(linear_problem(device, dtype)[:2]), **case.kwargs)

    @optims([FIP])
    def test_state_dict_pre_hook(self, device, dtype, optim_info):
        for optimizer in self._fresh(device, dtype, optim_info):
            optimizer.register_state_dict_pre_hook(lambda opt: opt.state.__setitem__("mark", 1))
            self.assertEqual(optimizer.state_dict()["state"]["mark"], 1)

    @optims([FIP])
    def test_state_dict_post_hook(self, device, dtype, optim_info):
        for optimizer in self._fresh(device, dtype, optim_info):
            optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "seen": True})
            self.assertTrue(optimizer.state_dict()["seen"])

    @optims([FIP])
    def test_state_dict_pre_post_hook(self, device, dtype, optim_info):
        def take_mark(opt: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            return {**state, "mark": state["state"].pop("mark")}

        for optimizer in self._fresh(device, dtype, optim_info):
            optimizer.register_state_dict_pre_hook(lambda opt: opt.state.__setitem__("mark", 1))
            optimizer.register_state_dict_post_hook(take_mark)
            state = optimizer.state_dict()
            self.assertEqual(state["mark"], 1)
            self.assertNotIn("mark", state["state"])

    @optims([FIP])
    def test_load_state_dict_pre_hook_and_prepend(self, device, dtype, optim_info):
        for optimizer in self._fresh(device, dtype, optim_info):
            state = optimizer.state_dict()
            optimizer.register_load_state_dict_pre_hook(set_lr_in_place)
            optimizer.load_state_dict(state)
            self.assertEqual(optimizer.param_groups[0]["lr"], 0.002)
            # Prepended, the second hook runs first and is overruled by the first.
            optimizer.register_load_state_dict_pre_hook(replace_lr, prepend=True)
            optimizer.load_state_dict(state)
            self.assertEqual(optimizer.param_groups[0]["lr"], 0.002)

    @optims([FIP])
    def test_load_state_dict_post_hook(self, device, dtype, optim_info):
        for optimizer in self._fresh(device, dtype, optim_info):
            seen: list[float] = []
            optimizer.register_load_state_dict_post_hook(
                lambda opt, seen=seen: seen.append(float(opt.param_groups[0]["lr"]))
            )
            optimizer.load_state_dict(optimizer.state_dict())
            self.assertEqual(seen, [float(optimizer.param_groups[0]["lr"])])

    @optims([FIP])
    def test_load_state_dict_pre_post_hook(self, device, dtype, optim_info):
        for optimizer in self._fresh(device, dtype, optim_info):
            seen: list[float] = []
            optimizer.register_load_state_dict_pre_hook(replace_lr)
            optimizer.register_load_state_dict_post_hook(
                lambda opt, seen=seen: seen.append(opt.param_groups[0]["lr"])
            )
            optimizer.load_state_dict(optimizer.state_dict())
            self.assertEqual(seen, [0.003])

    def _counted(self, device, dtype, optim_info, register: str) -> None:
        for optimizer in self._fresh(device, dtype, optim_info):
            calls: list[tuple[Any, ...]] = []
            handle = getattr(optimizer, register)(lambda *args, calls=calls: calls.append(args))
            optimizer.step()
            optimizer.step()
            self.assertEqual(len(calls), 2)
            self.assertIs(calls[0][0], optimizer)
            handle.remove()
            optimizer.step()
            self.assertEqual(len(calls), 2)

    @optims([FIP])
    def test_step_post_hook(self, device, dtype, optim_info):
        self._counted(device, dtype, optim_info, "register_step_post_hook")

    @optims([FIP])
    def test_step_pre_hook(self, device, dtype, optim_info):
        self._counted(device, dtype, optim_info, "register_step_pre_hook")

    @optims([FIP])
    def test_step_all_hooks(self, device, dtype, optim_info):
        for optimizer in self._fresh(device, dtype, optim_info):
            other = SGD([torch.ones(1, device=device, dtype=dtype)])
            order: list[str] = []

            def note(word: str, order: list[str] = order) -> Callable[..., None]:
                return lambda opt, args, kwargs: order.append(word)

            handles = [
                register_optimizer_step_pre_hook(note("all, before")),
                register_optimizer_step_post_hook(note("all, after")),
            ]
            for each in (optimizer, other):
                handles.append(each.register_step_pre_hook(note("before")))
                handles.append(each.register_step_post_hook(note("after")))
            once = ["all, before", "before", "after", "all, after"]
            try:
                optimizer.step()
                self.assertEqual(order, once)
                other.step()
                optimizer.step()
                self.assertEqual(order, once * 3)
            finally:
                for handle in handles:
                    handle.remove()
            optimizer.step()
            self.assertEqual(order, once * 3)

    @optims([FIP])
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        def public(obj: Any) -> set[str]:
            return {name for name in vars(obj) if not name.startswith("_")}

        for optimizer in self._fresh(device, dtype, optim_info):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.rand_like(p)
            for _ in range(3):
                optimizer.step()
            self.assertEqual(public(optimizer), public(copy.deepcopy(optimizer)))

    @optims([FIP])
    def test_second_order_optims_return_consistent_types(self, device, dtype, optim_info):
        for case in all_inputs(device, dtype, optim_info):
            weight, bias, x = linear_problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **case.kwargs)
            for convert in (lambda loss: loss, float):

                def closure(convert=convert, data=(optimizer, weight, bias, x)):
                    return convert(squares(*data))

                expected = closure()
                returned = optimizer.step(closure)
                self.assertIs(type(returned), type(expected))
                self.assertEqual(returned, expected)
            squares(optimizer, weight, bias, x)
            self.assertIsNone(optimizer.step())

    @optims([FIP])
    def test_non_empty_state(self, device, dtype, optim_info):
        for case in all_inputs(device, dtype, optim_info):
            weight, bias, x = linear_problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **case.kwargs)
            squares(optimizer, weight, bias, x)
            optimizer.step()
            for state in optimizer.state.values():
                self.assertGreater(len(state), 0)

    @optims([FIP])
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        for case in all_inputs(device, dtype, optim_info):
            weight, bias, _ = linear_problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **case.kwargs)
            before = copy.deepcopy([weight, bias])
            weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
            for _ in range(2):
                optimizer.step()
                self.assertEqual([weight, bias], before, rtol=0, atol=0)

    @optims([FIP])
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for case in all_inputs(device, dtype, optim_info):
            params = [torch.randn(2, 3, device=device, dtype=dtype) for _ in range(2)]
            before = copy.deepcopy(params)
            optimizer = optim_info.optim_cls(params, **case.kwargs)
            for _ in range(2):
                optimizer.step()
                self.assertEqual(params, before, rtol=0, atol=0)

    # Cases of torch that contradict our definition: these tests assert our definition.

    @optims([FIP], dtypes=[torch.float64])
    def test_no_gradient_at_all_is_the_free_path(self, device, dtype, optim_info):
        for case in all_inputs(device, dtype, optim_info):
            weight, bias, _ = linear_problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **case.kwargs)
            for _ in range(3):
                before = [p.detach().clone() for p in (weight, bias)]
                self.assertIsNone(optimizer.step())
                pairs = zip((weight, bias), before, strict=True)
                moved = math.hypot(*(float(p.dist(q)) for p, q in pairs))
                self.assertGreater(moved, 0, case.desc)
                self.assertTrue(math.isfinite(moved), case.desc)
            self.assertIsNone(weight.grad)

    @optims([FIP])
    def test_closure_without_backward_raises(self, device, dtype, optim_info):
        for case in all_inputs(device, dtype, optim_info):
            weight, bias, _ = linear_problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **case.kwargs)
            before = weight.detach().clone()
            with self.assertRaisesRegex((RuntimeError, ValueError), "(?s)closure.*backward"):
                optimizer.step(lambda: torch.ones((), device=device, dtype=dtype))
            self.assertEqual(weight.detach(), before, rtol=0, atol=0)


# TestDropIn is replaced by one class a device just below.
ANSWERED = {name for name in vars(TestDropIn) if name in TORCH_CASES}
instantiate_device_type_tests(TestDropIn, globals(), only_for=("cpu", "cuda"))


def test_every_case_of_torch_is_answered():
    assert ANSWERED | NOT_OURS.keys() == TORCH_CASES
    assert not ANSWERED & NOT_OURS.keys()
