"""Every scheduler of torch.optim drives FIPOptimizer: a group's lr is the length of its next step."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drop_in_task import Task, flat, same, step_length, values
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fipoptim import FIPOptimizer

T = 12  # steps

SCHEDULERS: dict[type[LRScheduler], list[Callable[[Any], LRScheduler]]] = {
    lr_scheduler.LambdaLR: [
        lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
        # The first step of this linear warm-up has lr = 0.
        lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: min(1.0, epoch / 4)),
    ],
    lr_scheduler.MultiplicativeLR: [
        lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.9),
    ],
    lr_scheduler.StepLR: [lambda opt: lr_scheduler.StepLR(opt, 3, gamma=0.5)],
    lr_scheduler.MultiStepLR: [lambda opt: lr_scheduler.MultiStepLR(opt, [2, 6], gamma=0.5)],
    lr_scheduler.ConstantLR: [lambda opt: lr_scheduler.ConstantLR(opt, 0.3, total_iters=5)],
    lr_scheduler.LinearLR: [lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=5)],
    lr_scheduler.ExponentialLR: [lambda opt: lr_scheduler.ExponentialLR(opt, 0.9)],
    # Both end at lr = 0 and stay there.
    lr_scheduler.PolynomialLR: [lambda opt: lr_scheduler.PolynomialLR(opt, T - 3, power=2.0)],
    lr_scheduler.CosineAnnealingLR: [lambda opt: lr_scheduler.CosineAnnealingLR(opt, T - 1)],
    lr_scheduler.CosineAnnealingWarmRestarts: [
        lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3, T_mult=2),
    ],
    lr_scheduler.SequentialLR: [
        lambda opt: lr_scheduler.SequentialLR(
            opt,
            [
                lr_scheduler.LambdaLR(opt, lambda epoch: epoch / 3),
                lr_scheduler.CosineAnnealingLR(opt, T),
            ],
            milestones=[3],
        ),
    ],
    lr_scheduler.ChainedScheduler: [
        lambda opt: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(opt, 0.5, 4), lr_scheduler.ExponentialLR(opt, 0.9)]
        ),
    ],
    lr_scheduler.ReduceLROnPlateau: [
        lambda opt: ReduceLROnPlateau(opt, factor=0.5, patience=0, threshold=0.5),
    ],
    lr_scheduler.CyclicLR: [
        lambda opt: lr_scheduler.CyclicLR(opt, 0.0, 0.05, step_size_up=3, cycle_momentum=False),
        lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.05, step_size_up=3),
    ],
    lr_scheduler.OneCycleLR: [
        lambda opt: lr_scheduler.OneCycleLR(opt, 0.05, total_steps=T + 1, cycle_momentum=False),
        lambda opt: lr_scheduler.OneCycleLR(opt, 0.05, total_steps=T + 1),
        lambda opt: lr_scheduler.OneCycleLR(opt, 0.05, total_steps=T + 1, three_phase=True),
    ],
    swa_utils.SWALR: [lambda opt: swa_utils.SWALR(opt, swa_lr=0.005, anneal_epochs=4)],
}
SCHEDULER_CASES = [
    pytest.param(make, id=f"{cls.__name__}{i or ''}")
    for cls, makers in SCHEDULERS.items()
    for i, make in enumerate(makers)
]


def test_every_scheduler_class_of_torch_is_in_the_table():
    classes = {
        cls
        for module in (lr_scheduler, swa_utils)
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, LRScheduler)
    }
    assert classes - {LRScheduler, lr_scheduler._LRScheduler} == SCHEDULERS.keys()


def drive(scheduler: LRScheduler, loss: float) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


@pytest.mark.parametrize("lr", ["float", "tensor", "two groups"])
@pytest.mark.parametrize("make", SCHEDULER_CASES)
def test_scheduler_sets_the_length_of_every_step(make, lr):
    task = Task()
    model = task.model
    eps: Any = torch.tensor(0.05, dtype=torch.float64) if lr == "tensor" else 0.05
    params: Any = model.parameters()
    if lr == "two groups":
        params = [
            {"params": model.body.parameters(), "lr": 0.02},
            {"params": model.head.parameters()},
        ]
    optimizer = FIPOptimizer(params, task.anchors(), eps=eps)
    scheduler = make(optimizer)
    start = task.loss().item()
    for _ in range(T):
        before = values(optimizer)
        resting = all(float(group["lr"]) == 0 for group in optimizer.param_groups)
        optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        optimizer.step()
        length = step_length(optimizer, before)
        assert length == (0 if resting else pytest.approx(1, rel=1e-6))
        drive(scheduler, loss.item())
    assert task.loss().item() < start


@pytest.mark.parametrize("make", SCHEDULER_CASES)
def test_scheduler_resumes_with_the_optimizer(make):
    def begin() -> tuple[Task, FIPOptimizer, LRScheduler]:
        task = Task()
        optimizer = FIPOptimizer(task.model.parameters(), task.anchors(), momentum=0.5)
        return task, optimizer, make(optimizer)

    def advance(task: Task, optimizer: FIPOptimizer, scheduler: LRScheduler) -> None:
        for _ in range(4):
            loss = optimizer.step(task.closure(optimizer))
            drive(scheduler, loss.item())

    run = begin()
    advance(*run)
    saved = copy.deepcopy([run[0].model.state_dict(), run[1].state_dict(), run[2].state_dict()])
    advance(*run)
    resumed = begin()
    for part, state in zip((resumed[0].model, *resumed[1:]), saved, strict=True):
        part.load_state_dict(state)
    assert [group["lr"] for group in resumed[1].param_groups] == resumed[2].get_last_lr()
    advance(*resumed)
    assert same(run[0].model, resumed[0].model)
    assert run[2].get_last_lr() == resumed[2].get_last_lr()


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_scheduler_that_cycles_momentum_sets_the_momentum_of_the_steps(name):
    make = SCHEDULERS[getattr(lr_scheduler, name)][1]
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors())
    scheduler = make(optimizer)
    seen = set()
    start = task.loss().item()
    for _ in range(T):
        seen.add(round(optimizer.param_groups[0]["momentum"], 4))
        optimizer.step(task.closure(optimizer))
        scheduler.step()
    assert len(seen) > 3
    assert 0.75 < min(seen) < max(seen) < 1
    assert task.loss().item() < start

    plain = Task()
    without = FIPOptimizer(plain.model.parameters(), plain.anchors())
    scheduler = make(without)
    for _ in range(T):
        without.param_groups[0]["momentum"] = 0.0
        without.step(plain.closure(without))
        scheduler.step()
    assert not same(task.model, plain.model)


def test_warm_up_steps_of_length_zero_do_not_change_later_steps():
    """Steps with lr = 0 move no weight, and later steps are the same as without them."""
    runs = []
    for rests in (0, 3):
        task = Task()
        optimizer = FIPOptimizer(task.model.parameters(), task.anchors())
        start = flat(task.model)
        for _ in range(rests):
            optimizer.param_groups[0]["lr"] = 0.0
            optimizer.step(task.closure(optimizer))
            assert torch.equal(flat(task.model), start)
        optimizer.param_groups[0]["lr"] = 0.05
        for _ in range(2):
            optimizer.step(task.closure(optimizer))
        runs.append(flat(task.model))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lr", [1, np.float64(0.1), np.float32(0.1), torch.tensor(0.1)])
def test_a_groups_lr_may_be_any_kind_of_number(lr):
    task = Task()
    params = [{"params": task.model.parameters(), "lr": lr}]
    optimizer = FIPOptimizer(params, task.anchors(), eps=0.3)
    before = values(optimizer)
    optimizer.step(task.closure(optimizer))
    assert step_length(optimizer, before) == pytest.approx(1, rel=1e-6)


BAD_OPTIONS = [("lr", value) for value in (-0.1, math.nan, math.inf, "0.1", None, torch.ones(2))]
BAD_OPTIONS += [("beta", value) for value in (-0.1, math.nan, None)]
BAD_OPTIONS += [("momentum", value) for value in (-0.1, 1.0, math.nan)]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_a_bad_value_set_by_a_scheduler_is_refused_before_any_weight_moves(name, value):
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors())
    start = flat(task.model)
    optimizer.param_groups[0][name] = value
    with pytest.raises((ValueError, TypeError), match=name):
        optimizer.step(task.closure(optimizer))
    assert torch.equal(flat(task.model), start)
    assert not optimizer.state
