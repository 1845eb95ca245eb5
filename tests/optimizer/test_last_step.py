"""What ``last_step`` says, and when it is measured."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fipoptim import AnchorBatch, FIPOptimizer, Solver


def run(**options: Any) -> tuple[nn.Sequential, FIPOptimizer]:
    """Returns a network in float64 after two steps without products."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    anchors = AnchorBatch(
        model,
        torch.randn(9, 4, dtype=torch.float64),
        batch_size=5,
        generator=torch.Generator().manual_seed(1),
    )
    options = {"solver": Solver(products=0), "precondition": "adam", "eps": 0.1} | options
    optimizer = FIPOptimizer(model.parameters(), anchors, **options)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Sequential, optimizer: FIPOptimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(7, 4, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


def info(optimizer: FIPOptimizer) -> Any:
    assert optimizer.last_step is not None
    return optimizer.last_step


def test_a_figure_that_is_read_late_is_the_one_that_is_measured_at_once() -> None:
    # A radius that no step reaches asks for the measurement.
    (_, lazy), (_, eager) = run(), run(solver=Solver(products=0, radius=1e9))
    for name in ("multiplier", "output_change", "drift"):
        assert getattr(info(lazy), name) == pytest.approx(getattr(info(eager), name), rel=1e-12)
    assert info(lazy).drift > 0
    assert info(lazy).output_change_predicted is None
    assert info(lazy).step_norm == info(eager).step_norm


def test_what_was_not_read_before_the_weights_moved_is_an_error_and_no_figure() -> None:
    model, optimizer = run()
    first = info(optimizer)
    step(model, optimizer)
    read = info(optimizer)
    assert read.drift > 0
    step(model, optimizer)
    assert read.drift > 0  # it has been measured
    with pytest.raises(RuntimeError, match="last_step: the weights have moved"):
        _ = first.drift
    assert "drift=not measured" in repr(first)
    assert first.step_norm > 0
    with torch.no_grad():
        model[0].weight.mul_(1.0)
    with pytest.raises(RuntimeError, match=r"Read last_step\.drift"):
        _ = info(optimizer).output_change


def test_copies_and_pickles_keep_the_figures() -> None:
    model, optimizer = run()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert info(other) == info(optimizer)
        assert info(other).drift == info(optimizer).drift
    step(model, optimizer)
    late = info(optimizer)
    step(model, optimizer)
    for other in (copy.deepcopy(late), pickle.loads(pickle.dumps(late))):
        with pytest.raises(RuntimeError, match="last_step"):
            _ = other.drift


def test_lr_is_another_name_for_eps() -> None:
    model = nn.Linear(2, 2)
    anchors = AnchorBatch(model, torch.randn(3, 2))
    assert FIPOptimizer(model.parameters(), anchors, lr=0.3).param_groups[0]["lr"] == 0.3
    assert FIPOptimizer(model.parameters(), anchors, lr=0.3, eps=0.3).defaults["lr"] == 0.3
    with pytest.raises(ValueError, match="lr: is another name for eps"):
        FIPOptimizer(model.parameters(), anchors, lr=0.3, eps=0.2)
    with pytest.raises(ValueError, match=r"lr: must be finite and >= 0, got -1\.0"):
        FIPOptimizer(model.parameters(), anchors, lr=-1.0)


def test_weight_decay_is_refused_with_what_to_use() -> None:
    model = nn.Linear(2, 2)
    anchors = AnchorBatch(model, torch.randn(3, 2))
    said = r"weight_decay: FIPOptimizer has none, got 0\.1.*add its term to the loss"
    with pytest.raises(ValueError, match=said):
        FIPOptimizer(model.parameters(), anchors, weight_decay=0.1)
    groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias]}]
    with pytest.raises(ValueError, match=said):
        FIPOptimizer(groups, anchors)
    groups[0]["weight_decay"] = 0.0  # as trainers give it
    optimizer = FIPOptimizer(groups, anchors, weight_decay=0.0)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    model(torch.randn(3, 2)).sum().backward()
    before = model.weight.clone()
    with pytest.raises(ValueError, match=said):
        optimizer.step()
    assert torch.equal(model.weight, before)
