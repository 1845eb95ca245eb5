"""FIPOptimizer in training loops: groups, gradients, closures, and loops written for others."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drop_in_harness import BareFIPOptimizer
from drop_in_task import Task, flat, same, step_length, values
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import lr_scheduler, swa_utils

from fipoptim import AnchorBatch, FIPOptimizer, Solver

# --- groups and parameters --------------------------------------------------------------------------


def test_eps_fills_the_lr_of_groups_that_have_none():
    task = Task()
    groups = [
        {"params": task.model.body.parameters(), "lr": 0.2},
        {"params": [task.model.head.weight]},
    ]
    optimizer = FIPOptimizer(groups, task.anchors(), eps=0.1, beta=2.0, momentum=0.5)
    optimizer.add_param_group({"params": task.model.head.bias, "beta": 3.0})
    assert optimizer.defaults["lr"] == 0.1
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1, 0.1]
    assert [group["beta"] for group in optimizer.param_groups] == [2.0, 2.0, 3.0]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.5] * 3


def test_added_group_joins_in_the_next_step():
    task = Task()
    optimizer = FIPOptimizer(task.model.body.parameters(), task.anchors(), eps=0.05, momentum=0.5)
    head = flat(task.model.head)
    optimizer.step(task.closure(optimizer))
    assert torch.equal(flat(task.model.head), head)
    optimizer.add_param_group({"params": task.model.head.parameters(), "lr": 0.01})
    for _ in range(2):
        before = values(optimizer)
        optimizer.step(task.closure(optimizer))
        assert not torch.equal(before[task.model.head.weight], task.model.head.weight)
        assert math.isfinite(step_length(optimizer, before))
    fresh = FIPOptimizer(task.model.body.parameters(), task.anchors())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        fresh.load_state_dict(optimizer.state_dict())


def test_bare_parameters_can_be_added():
    first, second = Parameter(torch.ones(3)), Parameter(torch.ones(2, 2))
    optimizer = BareFIPOptimizer([first], lr=0.1)
    optimizer.step()
    optimizer.add_param_group({"params": second, "lr": 0.5})
    assert optimizer.anchors.drift() >= 0
    (first.sum() + second.square().sum()).backward()
    optimizer.step()
    assert not torch.equal(second, torch.ones(2, 2))


def test_refused_group_leaves_the_optimizer_as_it_was():
    task = Task()
    optimizer = FIPOptimizer(task.model.body.parameters(), task.anchors())
    weight = task.model.head.weight
    for group, match in (
        ({"params": [weight], "lr": -1.0}, "lr"),
        ({"params": [weight], "beta": math.nan}, "beta"),
        ({"params": [weight, Parameter(torch.ones(2))]}, "(?s)params.*model"),
        ({"params": [task.model.body.weight]}, "more than one parameter group"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    optimizer.step(task.closure(optimizer))


def test_parameters_of_another_model_are_refused():
    task = Task()
    with pytest.raises(ValueError, match=r"(?s)params.*model"):
        FIPOptimizer(Task().model.parameters(), task.anchors())


def test_options_of_other_optimizers_are_refused():
    task = Task()
    for option in ("foreach", "fused", "capturable", "maximize"):
        with pytest.raises(TypeError, match=option):
            FIPOptimizer(task.model.parameters(), task.anchors(), **{option: 1})


def test_parameters_without_gradient_are_skipped():
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors(), eps=0.05, momentum=0.5)
    for _ in range(2):
        before = values(optimizer)
        optimizer.zero_grad()
        task.loss().backward()
        task.model.body.weight.grad = None
        optimizer.step()
        assert torch.equal(task.model.body.weight, before[task.model.body.weight])
        assert not torch.equal(task.model.head.weight, before[task.model.head.weight])
        assert step_length(optimizer, before) == pytest.approx(1, rel=1e-6)


def test_parameters_can_be_frozen_and_thawed_on_the_way():
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors(), eps=0.05, momentum=0.5)
    weight = task.model.body.weight
    for frozen in (False, True, True, False):
        weight.requires_grad_(not frozen)
        before = weight.detach().clone()
        optimizer.step(task.closure(optimizer))
        assert torch.equal(weight, before) is frozen
        optimizer.zero_grad()
        before = weight.detach().clone()
        optimizer.step()  # a step with L = 0 does not move frozen parameters either
        assert torch.equal(weight, before) is frozen


def test_parameters_are_read_from_the_groups_at_every_step():
    """Accelerate and others put new tensors into the groups and the model."""
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors(), eps=0.05)
    optimizer.step(task.closure(optimizer))
    old = task.model.body.weight
    new = task.model.body.weight = Parameter(old.detach().clone())
    params = optimizer.param_groups[0]["params"]
    params[[p is old for p in params].index(True)] = new
    kept, before = old.detach().clone(), values(optimizer)
    optimizer.step(task.closure(optimizer))
    assert torch.equal(old, kept)
    assert step_length(optimizer, before) == pytest.approx(1, rel=1e-6)


def test_the_order_of_parameters_does_not_change_the_step():
    ends = []
    for order in (list, reversed):
        task = Task()
        params = list(order(list(task.model.named_parameters())))
        optimizer = FIPOptimizer(params, task.anchors(), solver=Solver(products=30), eps=0.2)
        for _ in range(2):
            optimizer.step(task.closure(optimizer))
        ends.append(flat(task.model))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)


def test_empty_and_scalar_parameters():
    params = [Parameter(torch.empty(0)), Parameter(torch.tensor(1.5)), Parameter(torch.ones(2, 3))]
    optimizer = BareFIPOptimizer(params, lr=0.1)
    for with_gradient in (True, True, False):
        optimizer.zero_grad()
        if with_gradient:
            sum(p.square().sum() for p in params).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.filterwarnings("ignore:.*duplicate parameters.*:UserWarning")
def test_a_parameter_given_twice_moves_once():
    p = Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = BareFIPOptimizer([p, p], lr=0.1)
    p.square().sum().backward()
    before = p.detach().clone()
    optimizer.step()
    assert float(p.detach().dist(before)) == pytest.approx(0.1, rel=1e-6)


def test_named_parameters():
    task = Task()
    optimizer = FIPOptimizer(task.model.named_parameters(), task.anchors())
    names = ["body.weight", "body.bias", "head.weight", "head.bias"]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    optimizer.step(task.closure(optimizer))
    plain = Task()
    unnamed = FIPOptimizer(plain.model.parameters(), plain.anchors())
    unnamed.step(plain.closure(unnamed))
    assert same(task.model, plain.model)
    renamed = [(f"other.{name}", p) for name, p in task.model.named_parameters()]
    # Parameters are matched by identity and not by name.
    other = FIPOptimizer(renamed, task.anchors())
    other.step(task.closure(other))


# --- gradients --------------------------------------------------------------------------------------


def test_zero_grad():
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors())
    task.loss().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in task.model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in task.model.parameters())


@pytest.mark.parametrize("eps", [0.05, torch.tensor(0.05)])
def test_a_step_leaves_gradients_and_global_randomness_alone(eps):
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors(batch_size=3), eps=eps)
    task.model.train()
    task.loss().backward()
    grads = [p.grad.clone() for p in task.model.parameters()]
    state = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(task.model.parameters(), grads, strict=True))
    assert all(p.grad_fn is None and p.requires_grad for p in task.model.parameters())
    assert task.model.training
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in task.model.parameters())


def test_closure_is_called_once_with_gradients_enabled():
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors())
    inner = task.closure(optimizer)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return inner()

    with torch.no_grad():
        loss = optimizer.step(closure=closure)
    assert calls == [True]
    assert loss.requires_grad
    assert optimizer.last_step.loss == pytest.approx(float(loss))


def test_closure_and_gradient_give_the_same_step():
    by_closure, by_gradient = Task(), Task()
    one = FIPOptimizer(by_closure.model.parameters(), by_closure.anchors())
    two = FIPOptimizer(by_gradient.model.parameters(), by_gradient.anchors())
    for _ in range(3):
        one.step(by_closure.closure(one))
        by_gradient.closure(two)()
        two.step()
    assert same(by_closure.model, by_gradient.model)


def test_closure_may_return_nothing_or_fail():
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors())
    inner, start = task.closure(optimizer), flat(task.model)

    def failing() -> Tensor:
        inner()
        raise KeyError("a broken batch")

    with pytest.raises(KeyError, match="a broken batch"):
        optimizer.step(failing)
    assert torch.equal(flat(task.model), start)
    assert not optimizer.state
    # A closure of Lightning may return None.
    assert optimizer.step(lambda: inner() and None) is None
    assert not torch.equal(flat(task.model), start)


def left_none(optimizer):
    optimizer.zero_grad()


def left_zero(optimizer):
    optimizer.zero_grad(set_to_none=False)


def left_old(optimizer):
    pass


@pytest.mark.parametrize("leave", [left_none, left_zero, left_old])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "precondition": "adam"}])
def test_closure_that_returns_none_without_backward_skips_its_batch(leave, options):
    """Lightning has such a closure if training_step returns None, and many loops have one for a broken batch."""
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors(), **options)
    for _ in range(2):
        optimizer.step(task.closure(optimizer))
    start, before, last = flat(task.model), copy.deepcopy(optimizer.state), optimizer.last_step
    assert optimizer.step(lambda: leave(optimizer)) is None
    assert torch.equal(flat(task.model), start)
    torch.testing.assert_close(list(optimizer.state.values()), list(before.values()))
    assert optimizer.last_step is last
    optimizer.step(task.closure(optimizer))
    assert not torch.equal(flat(task.model), start)


def test_first_batch_may_be_skipped():
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors())
    start = flat(task.model)
    assert optimizer.step(lambda: None) is None
    assert torch.equal(flat(task.model), start)
    assert optimizer.last_step is None


def test_pre_hook_can_replace_the_closure():
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors())
    inner = task.closure(optimizer)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: inner() * 0 + 7), {}))
    assert float(optimizer.step(lambda: pytest.fail("replaced"))) == 7


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_accumulated_and_clipped_gradients(factor):
    accumulated, whole = Task(), Task()
    one = FIPOptimizer(accumulated.model.parameters(), accumulated.anchors(), eps=0.05)
    two = FIPOptimizer(whole.model.parameters(), whole.anchors(), eps=0.05)
    start = whole.loss().item()
    for _ in range(5):
        one.zero_grad()
        for part in (slice(0, 12), slice(12, 24)):
            logits = accumulated.model(accumulated.x[part])
            (F.cross_entropy(logits, accumulated.y[part]) / 2).backward()
        whole.closure(two)()
        for task, optimizer in ((accumulated, one), (whole, two)):
            norm = nn.utils.clip_grad_norm_(task.model.parameters(), factor)
            assert float(norm) > 0
            optimizer.step()
    torch.testing.assert_close(flat(accumulated.model), flat(whole.model), rtol=1e-7, atol=1e-9)
    assert whole.loss().item() < start


def test_autocast_around_the_step_changes_nothing():
    plain, cast = Task(), Task()
    one = FIPOptimizer(plain.model.parameters(), plain.anchors())
    two = FIPOptimizer(cast.model.parameters(), cast.anchors())
    for _ in range(2):
        plain.closure(one)()
        one.step()
        cast.closure(two)()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            two.step()
    assert same(plain.model, cast.model)


@pytest.mark.parametrize("how", ["plain", "unscaled", "positional closure"])
def test_grad_scaler_is_refused(how):
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors())
    scaler = torch.amp.GradScaler("cpu")
    start = flat(task.model)
    optimizer.zero_grad()
    scaler.scale(task.loss()).backward()
    if how == "unscaled":
        scaler.unscale_(optimizer)
    args = (task.closure(optimizer),) if how == "positional closure" else ()
    with pytest.raises((RuntimeError, TypeError), match="GradScaler"):
        scaler.step(optimizer, *args)
    assert torch.equal(flat(task.model), start)
    copy.deepcopy(optimizer)  # the optimizer can still be copied and inspected after the refusal
    assert "lr" in repr(optimizer)


def test_a_disabled_grad_scaler_is_accepted():
    """The usual mixed-precision loop carries GradScaler(enabled=False) when it runs in bfloat16."""
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    start = flat(task.model)
    scaler.scale(task.loss()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(flat(task.model), start)


# --- loops written for other optimizers -------------------------------------------------------------


def lbfgs_loop(model: nn.Module, x: Tensor, y: Tensor, make: Callable[[nn.Module], Any]) -> None:
    optimizer = make(model)
    for _ in range(15):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert math.isfinite(loss.item())


def adamw_loop(model: nn.Module, x: Tensor, y: Tensor, make: Callable[[nn.Module], Any]) -> None:
    optimizer = make(model)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    for _ in range(15):
        for inputs, targets in loader:
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        scheduler.step()


def test_an_averaged_model_is_the_mean_of_the_visited_weights():
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors(), eps=0.05)
    averaged = swa_utils.AveragedModel(task.model)
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
    visited = []
    for _ in range(4):
        optimizer.step(task.closure(optimizer))
        averaged.update_parameters(task.model)
        scheduler.step()
        visited.append(flat(task.model))
    torch.testing.assert_close(flat(averaged.module), torch.stack(visited).mean(dim=0))
    assert all(type(p) is Parameter for p in averaged.parameters())


@pytest.mark.parametrize(
    ("loop", "theirs"),
    [
        (lbfgs_loop, lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1)),
        (adamw_loop, lambda model: torch.optim.AdamW(model.parameters(), lr=0.05)),
    ],
    ids=["LBFGS", "AdamW"],
)
def test_loop_runs_with_only_the_constructor_changed(loop, theirs):
    drifts = []
    old = Task().old
    for make in (
        theirs,
        lambda model: FIPOptimizer(model.parameters(), AnchorBatch(model, old), eps=0.2, beta=10.0),
    ):
        task = Task()
        anchors = task.anchors()
        start = task.loss().item()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loop(task.model, task.x, task.y, make)
        assert task.loss().item() < 0.6 * start
        drifts.append(anchors.drift())
    assert drifts[1] < 0.5 * drifts[0]
