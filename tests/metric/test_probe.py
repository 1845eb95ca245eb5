"""The probe accepts models whose products are right, on kinks and in any precision, and finds the wrong ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver
from fipoptim.metric.probe import probe


def verdict(model: nn.Module, inputs: Tensor, **options: Any) -> str:
    anchors = AnchorBatch(model, inputs, **options)
    return probe(anchors, [p for p in model.parameters() if p.requires_grad])


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


DETACHED = Applied(lambda x: x.detach() * 1.0)

# --- kinks ---------------------------------------------------------------------------------------------------

KINKED = {
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(),
    "hardswish": nn.Hardswish(),
    "abs": Applied(torch.abs),
    "clamp": Applied(lambda x: x.clamp(0, 1)),
    "sort": Applied(lambda x: x.sort(dim=-1).values),
    "maximum": Applied(lambda x: torch.maximum(x, torch.zeros_like(x))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kink", sorted(KINKED))
def test_a_network_on_a_kink_is_accepted(kink: str, dtype: torch.dtype) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 2), KINKED[kink], nn.Linear(2, 1)).to(dtype)
        with torch.no_grad():
            model[0].weight[0], model[0].bias[0] = 0, 0
        assert verdict(model, torch.randn(5, 2, dtype=dtype)) == "forward"


def pruned_cnn() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    with torch.no_grad():
        for p in model[:2].parameters():
            p[0] = 0
        for p in model[4].parameters():
            p[:2] = 0
    x = torch.randn(6, 1, 10, 10)
    x[:3], x[4:, :, :5] = 0, 0
    return model, x


def all_zero() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    for p in model.parameters():
        nn.init.zeros_(p)
    return model, torch.randn(5, 4)


def zero_inputs() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.zeros(5, 4)


class ZeroResidual(nn.Module):
    """A residual block that starts as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        nn.init.zeros_(self.norm.weight)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(x + self.norm(self.conv(x))).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "build",
    [
        pruned_cnn,
        all_zero,
        zero_inputs,
        lambda: (ZeroResidual(), torch.randn(5, 2, 4, 4).relu()),
    ],
)
def test_pruned_and_freshly_initialised_networks_are_accepted(build: Any) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        assert verdict(*build()) == "forward"


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("output", ["logits", "probabilities"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_detached_part_is_found_in_a_network_with_kinks(
    activation: Any, output: str, scale: float
) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(8, 32),
            activation(),
            DETACHED,
            nn.Linear(32, 32),
            activation(),
            nn.Linear(32, 3),
        )
        with torch.no_grad():
            model[0].weight[::2], model[0].bias[::2] = 0, 0
            for p in model.parameters():
                p *= scale
        with pytest.raises(RuntimeError, match=r"by '0.weight', '0.bias'.*detach"):
            verdict(model, torch.randn(9, 8), output=output)


# --- precision -----------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen layer of half precision and a low-rank update in float32, zero at first."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x.float() @ self.a.T @ self.b.T).to(x.dtype)


class Autocast(nn.Module):
    """Turns autocast on in its own forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(x).float()


def mlp(width: int = 32, scale: float = 1.0, activation: Any = nn.Tanh) -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(8, width),
        activation(),
        nn.Linear(width, width),
        activation(),
        nn.Linear(width, 3),
    )
    with torch.no_grad():
        for p in model.parameters():
            p *= scale
    return model


@pytest.mark.parametrize("output", ["logits", "probabilities"])
@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_on_a_frozen_half_precision_base_is_accepted(
    dtype: torch.dtype, depth: int, output: str
) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        layers = [LoRA(8 if i == 0 else 32, 32, dtype) for i in range(depth)]
        model = nn.Sequential(
            *(x for layer in layers for x in (layer, nn.ReLU())), LoRA(32, 3, dtype)
        )
        inputs = torch.randn(9, 8).to(dtype)
        assert verdict(model, inputs, output=output) == "forward"


@pytest.mark.parametrize(
    "build",
    [
        lambda: (Autocast(mlp()), torch.randn(9, 8)),
        lambda: (Autocast(mlp(3)), torch.randn(2, 8)),
        lambda: (Autocast(nn.Linear(8, 1)), torch.randn(1, 8)),
        lambda: (
            nn.Sequential(
                nn.Linear(8, 16),
                Applied(lambda x: x.float().tanh().to(x.dtype)),
                nn.Linear(16, 3),
            ).double(),
            torch.randn(9, 8).double(),
        ),
        lambda: (
            nn.Sequential(
                nn.Linear(8, 16),
                Applied(lambda x: x.bfloat16().tanh().to(x.dtype)),
                nn.Linear(16, 3),
            ).double(),
            torch.randn(9, 8).double(),
        ),
    ],
)
def test_precision_lost_inside_the_model_is_allowed_for(build: Any) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        assert verdict(*build()) == "forward"


def test_a_detached_part_is_found_in_a_half_precision_network() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        base = nn.Linear(8, 16).half().requires_grad_(False)
        model = nn.Sequential(
            base, Applied(Tensor.float), nn.Linear(16, 16), DETACHED, nn.Linear(16, 3)
        )
        with pytest.raises(RuntimeError, match=r"by '2.weight', '2.bias'.*half precision"):
            verdict(model, torch.randn(9, 8).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("scale", [1e-3, 1e-2, 0.1, 1.0, 10.0, 30.0, 100.0, 1e3])
def test_probabilities_are_accepted_at_all_scales_of_the_weights(
    scale: float, activation: Any, dtype: torch.dtype
) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model = mlp(32, scale, activation).to(dtype)
        inputs = torch.randn(9, 8, dtype=dtype)
        assert verdict(model, inputs, output="probabilities") == "forward"


# --- where and when the probe runs --------------------------------------------------------------------------------


def test_the_probe_works_under_a_default_device_and_in_inference_mode() -> None:
    model = mlp()
    anchors, params = AnchorBatch(model, torch.randn(9, 8)), list(model.parameters())
    with torch.device("meta"):  # stands for a GPU
        assert probe(anchors, params) == "forward"
    with torch.inference_mode():
        assert probe(anchors, params) == "forward"
        anchors.inputs = torch.randn(9, 8)
        assert probe(anchors, params) == "forward"
    assert not any(p.is_inference() for p in params)


def test_the_anchors_looked_at_are_spread_over_all() -> None:
    seen: list[Tensor] = []

    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x[:, 0].clone())
            return super().forward(x)

    inputs = torch.arange(100.0).unsqueeze(1)
    anchors = AnchorBatch(Noting(1, 2), inputs)
    seen.clear()
    probe(anchors, list(anchors.model.parameters()))
    looked = {tuple(x.tolist()) for x in seen if len(x) == 8}
    assert looked == {(0.0, 14.0, 28.0, 42.0, 56.0, 70.0, 84.0, 99.0)}


# --- the verdict ------------------------------------------------------------------------------------------------


def test_the_error_says_what_the_probe_saw_and_how_to_continue() -> None:
    torch.manual_seed(0)
    # A straight-through estimator.
    rounding = Applied(lambda x: x + ((4 * x).round() / 4 - x).detach())
    model = nn.Sequential(nn.Linear(8, 16), rounding, nn.Linear(16, 3))
    anchors = AnchorBatch(model, torch.randn(9, 8))
    with pytest.raises(RuntimeError) as caught:
        AnchorMetric(anchors)
    words = str(caught.value)
    assert re.search(r"differs from a finite difference by \d+ %", words)
    assert "all 3 outputs by '0.weight', '0.bias'" in words
    assert "straight-through" in words
    assert 'give form="forward" to FIPOptimizer or AnchorMetric' in words
    assert AnchorMetric(anchors, form="forward").form == "forward"


class Half(torch.autograd.Function):
    """The identity, whose backward halves gradients."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad / 2


class Hooked(nn.Module):
    """Halves the gradient of its hidden layer by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if h.requires_grad:
            h.register_hook(lambda grad: grad / 2)
        return self.last(h)


@pytest.mark.parametrize("how", ["function", "hook"])
def test_scaled_gradients_are_recognised(how: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = Hooked()
    if how == "function":
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), Applied(Half.apply), nn.Linear(16, 3))
    with pytest.raises(RuntimeError, match=r"autograd's are 0.5 times .*scales or reverses"):
        verdict(model, torch.randn(9, 8))


def test_a_hook_on_a_parameter_is_no_part_of_the_function() -> None:
    model = mlp()
    model[0].weight.register_hook(lambda grad: 2 * grad)
    assert verdict(model, torch.randn(9, 8)) == "forward"


def test_a_model_that_writes_to_its_weights_is_refused_by_name() -> None:
    class Clamped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data.clamp_(-0.01, 0.01)
            return super().forward(x)

    with pytest.raises(RuntimeError, match="writes to 'weight' as it is evaluated"):
        verdict(Clamped(8, 3), torch.randn(9, 8))


# --- models whose forward-mode derivative is missing or wrong ---------------------------------------------


class Cube(torch.autograd.Function):
    """An old-style function: it has only a backward, which is differentiable."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Wrapped(nn.Module):
    def __init__(self, middle) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.first, self.last = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self, torch.tanh(self.first(x))))


def test_a_model_without_forward_mode_gets_the_double_vjp_form_with_a_warning() -> None:
    model = Wrapped(lambda self, h: Cube.apply(h))
    inputs = torch.randn(5, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="double-VJP form"):
        metric = AnchorMetric(AnchorBatch(model, inputs))
    assert metric.form == "double-vjp"
    assert "double-vjp" in repr(metric)
    same = Wrapped(lambda self, h: h**3)
    same.load_state_dict(model.state_dict())
    v = torch.randn(metric.size, dtype=torch.float64)
    expected = AnchorMetric(AnchorBatch(same, inputs))
    assert expected.form == "forward"
    torch.testing.assert_close(metric.matvec(v), expected.matvec(v))
    opt = FIPOptimizer(model.parameters(), AnchorBatch(model, inputs))
    with pytest.warns(UserWarning, match="double-VJP form"):
        assert opt.form == "double-vjp"
    opt.step()  # a second warning would be an error


class CubeOnce(torch.autograd.Function):
    """The third power, which can be differentiated backward, once."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_is_differentiated_once_gets_finite_differences_with_a_warning(
    dtype: torch.dtype,
) -> None:
    model = Wrapped(lambda self, h: CubeOnce.apply(h)).to(dtype)
    inputs = torch.randn(5, 4, dtype=dtype)
    with pytest.warns(UserWarning, match="by finite differences of its outputs"):
        metric = AnchorMetric(AnchorBatch(model, inputs))
    assert metric.form == "finite-difference"
    same = Wrapped(lambda self, h: h**3).to(dtype)
    same.load_state_dict(model.state_dict())
    v = torch.randn(metric.size, dtype=dtype)
    expected = AnchorMetric(AnchorBatch(same, inputs), form="forward").matvec(v)
    error = float((metric.matvec(v) - expected).norm() / expected.norm())
    assert error < (1e-3 if dtype == torch.float32 else 1e-8)


def test_finite_differences_do_not_hide_a_wrong_backward_pass() -> None:
    model = Wrapped(lambda self, h: h + CubeOnce.apply(h.detach()))
    with pytest.raises(RuntimeError, match="no form of Jacobian-vector product is right"):
        AnchorMetric(AnchorBatch(model, torch.randn(5, 4, dtype=torch.float64)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_is_found_by_the_finite_difference() -> None:
    model = Wrapped(lambda self, h: checkpoint(torch.tanh, h, use_reentrant=True))
    with pytest.raises(
        RuntimeError, match=r"no form of Jacobian-vector product is right.*reentrant"
    ):
        AnchorMetric(AnchorBatch(model, torch.randn(5, 4, dtype=torch.float64)))


# torch 2.11 has no forward mode for this checkpointing.
@pytest.mark.filterwarnings("ignore:fipoptim. forward-mode products")
def test_products_of_a_model_with_non_reentrant_checkpointing_are_right() -> None:
    model = Wrapped(lambda self, h: checkpoint(torch.tanh, h, use_reentrant=False))
    plain = Wrapped(lambda self, h: torch.tanh(h))
    plain.load_state_dict(model.state_dict())
    inputs = torch.randn(5, 4, dtype=torch.float64)
    metric, expected = (AnchorMetric(AnchorBatch(m, inputs)) for m in (model, plain))
    v = torch.randn(metric.size, dtype=torch.float64)
    torch.testing.assert_close(metric.matvec(v), expected.matvec(v))


def test_a_part_cut_off_by_detach_is_found() -> None:
    model = Wrapped(lambda self, h: h + torch.tanh(self.first.weight).sum().detach() * h.detach())
    with pytest.raises(RuntimeError, match="no form of Jacobian-vector product is right"):
        AnchorMetric(AnchorBatch(model, torch.randn(5, 4, dtype=torch.float64)))


@pytest.mark.parametrize("where", ["functional", "noise"])
def test_randomness_in_eval_mode_is_refused(where: str) -> None:
    model = Wrapped(
        lambda self, h: (
            nn.functional.dropout(h, 0.5, training=True)
            if where == "functional"
            else h + torch.randn_like(h)
        )
    )
    anchors = AnchorBatch(model, torch.randn(5, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="model: two evaluations"):
        AnchorMetric(anchors)
    for solver in (Solver(products=0), Solver(products=1)):
        optimizer = FIPOptimizer(model.parameters(), anchors, solver=solver)
        with pytest.raises(ValueError, match="model: two evaluations"):
            optimizer.step()


def test_outputs_without_a_derivative_name_the_cause() -> None:
    class NumPy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return torch.from_numpy(np.tanh(x.detach().numpy()))

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            raise NotImplementedError("tanh of NumPy has no derivative here")

    model = Wrapped(lambda self, h: NumPy.apply(h))
    with pytest.raises(RuntimeError, match="has no derivative here"):
        AnchorMetric(AnchorBatch(model, torch.randn(5, 4, dtype=torch.float64)))


def test_the_probe_computes_in_whole_float32_and_puts_the_precision_back() -> None:
    layers = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    seen = []

    class Noting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append([layer.fp32_precision for layer in layers])
            return super().forward(x)

    before = [layer.fp32_precision for layer in layers]
    anchors = AnchorBatch(Noting(3, 2), torch.randn(4, 3))
    seen.clear()
    probe(anchors, list(anchors.model.parameters()))
    assert seen
    assert all(found == ["ieee"] * 3 for found in seen)
    assert [layer.fp32_precision for layer in layers] == before
