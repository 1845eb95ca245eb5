"""max_drift bounds the value of drift() after every step, whatever else happens in the step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver

BUDGET = 1e-2


def by_the_batch() -> nn.Sequential:
    """Batch norm without running statistics: the outputs of an anchor depend on the anchors beside it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 4 * 4, 3),
    )


def by_class(count: int) -> Tensor:
    """Images sorted by class, so that a chunk has other statistics than all images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 6, 6, generator=generator)
    return images + torch.arange(count).div(count / 4).floor().view(-1, 1, 1, 1)


@pytest.mark.parametrize("chunk_size", [None, 150])
@pytest.mark.parametrize("products", [0, 2, "adaptive"])
def test_max_drift_bounds_the_drift_of_anchors_that_depend_on_each_other(
    products: int | str, chunk_size: int | None
) -> None:
    model = by_the_batch()
    anchors = AnchorBatch(model, by_class(200), chunk_size=chunk_size)
    optimizer = FIPOptimizer(
        model.parameters(), anchors, eps=0.05, max_drift=BUDGET, solver=Solver(products=products)
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(15):
        optimizer.zero_grad()
        model(torch.randn(16, 1, 6, 6, generator=generator)).square().sum().backward()
        optimizer.step()
        assert optimizer.last_step.drift == anchors.drift() <= BUDGET


@pytest.mark.parametrize("chunk_size", [None, 150])
def test_the_metric_is_of_the_function_that_drift_measures(chunk_size: int | None) -> None:
    model = by_the_batch()
    anchors = AnchorBatch(model, by_class(200), chunk_size=chunk_size)
    metric = AnchorMetric(anchors)
    torch.testing.assert_close(metric.outputs, anchors.reference)
    v = 1e-3 * torch.linspace(-1, 1, metric.size)
    with torch.no_grad():
        for p, part in zip(metric.params, metric.unflatten(v), strict=True):
            p.add_(part)
    moved = anchors.outputs(anchors.inputs) - anchors.reference
    change = float(moved.norm() - AnchorMetric(anchors, form="forward").jvp(v).norm())
    assert abs(change) < 0.05 * float(moved.norm())


class Trained(nn.Module):
    """Batch norm whose running statistics follow every batch in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def no_rate(model: nn.Module, optimizer: FIPOptimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.0
    model(torch.randn(8, 4) + 3).sum().backward()
    optimizer.step()


def no_gradient_of_the_closure(model: nn.Module, optimizer: FIPOptimizer) -> None:
    def closure() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 4) + 3)

    optimizer.step(closure)


def frozen(model: nn.Module, optimizer: FIPOptimizer) -> None:
    model.requires_grad_(False)
    model(torch.randn(8, 4) + 3)
    optimizer.step()


@pytest.mark.parametrize("rest", [no_rate, no_gradient_of_the_closure, frozen])
def test_max_drift_is_checked_in_a_step_that_moves_no_weight(
    rest: Callable[[nn.Module, FIPOptimizer], None],
) -> None:
    torch.manual_seed(0)
    model = Trained()
    anchors = AnchorBatch(model, torch.randn(8, 4))
    optimizer = FIPOptimizer(model.parameters(), anchors, max_drift=1e-3)
    start = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"^max_drift: the drift is .* moves no weight"):
        for _ in range(5):
            rest(model, optimizer)
    assert anchors.drift() > 1e-3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    model.eval()
    anchors.refresh()
    rest(model, optimizer)  # nothing is raised within the budget


def test_max_drift_holds_beside_another_optimizer_that_steps_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    anchors = AnchorBatch(model, torch.randn(9, 4))
    ours = FIPOptimizer(model[0].parameters(), anchors, eps=0.05, max_drift=0.05)
    theirs = torch.optim.AdamW(model[2].parameters(), lr=1e-3)
    for _ in range(5):
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        theirs.step()  # the documented order: the other optimizer steps first
        ours.step()
        assert ours.last_step.drift == anchors.drift() <= 0.05
