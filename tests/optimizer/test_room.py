"""What a budget leaves room for, and how it bounds the steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.budget import Budget
from fipoptim.room import radius, room_within


class Fixed(nn.Module):
    """Gives its inputs back, so that the outputs are whatever is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def anchors(outputs: Tensor) -> AnchorBatch:
    return AnchorBatch(Fixed(), outputs)


def test_a_budget_of_drift_is_the_room() -> None:
    held = anchors(torch.eye(3))
    assert room_within(Budget(max_drift=2.0), held) == 2.0
    assert room_within(Budget(), held) == math.inf


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.2])
def test_random_changes_as_large_as_the_room_flip_about_the_share(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = 5 * torch.randn(4000, 10, generator=generator)
    drift = room_within(Budget(max_flips=share), anchors(outputs))
    change = torch.randn(4000, 10, generator=generator) * (drift / 10) ** 0.5
    flips = float(((outputs + change).argmax(1) != outputs.argmax(1)).float().mean())
    assert share / 2 <= flips <= 2 * share + 0.001


def test_a_single_score_has_the_margin_to_zero() -> None:
    drift = room_within(Budget(max_flips=0.0), anchors(torch.tensor([[3.0], [-2.0], [5.0]])))
    assert drift == pytest.approx(math.pi * 2 * 2.0**2)  # as if its margin were sqrt(2) * 2


def test_each_prediction_of_an_input_counts() -> None:
    tokens = torch.tensor([[[9.0, 0.0], [3.0, 1.0]], [[8.0, 0.0], [0.0, 7.0]]])
    drift = room_within(Budget(max_flips=0.0), anchors(tokens))
    assert drift == pytest.approx(math.pi * 4 * 2.0**2)  # four outputs, and a least margin of 2


def test_the_strictest_bound_is_the_room() -> None:
    held = anchors(torch.tensor([[3.0], [-2.0]]))
    assert room_within(Budget(max_drift=1.0, max_flips=0.0), held) == 1.0
    assert room_within(Budget(max_drift=99.0, max_flips=0.0), held) == pytest.approx(8 * math.pi)


def test_only_a_budget_that_need_not_hold_at_every_step_bounds_a_step() -> None:
    assert radius(None, 4.0, None) == radius(None, 4.0, 10) == 2.0
    assert radius(None, 4.0, 1) is radius(None, math.inf, None) is radius(None, 0.0, None) is None
    assert radius(1.0, 4.0, None) == radius(1.0, 4.0, 1) == radius(1.0, math.inf, 1) == 1.0
    assert radius(3.0, 4.0, None) == 2.0


@pytest.mark.parametrize("products", [0, 3, "adaptive"])
def test_no_step_goes_further_than_the_whole_run_may(products: int | str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x = torch.randn(20, 4)
    held = AnchorBatch(model, x)

    def first_change(solver: Solver, check_every: int | None = None) -> float:
        nn.init.constant_(model.weight, 0.1)
        held.refresh()
        optimizer = FIPOptimizer(
            model.parameters(),
            held,
            eps=5.0,
            max_drift=0.25,
            check_every=check_every,
            solver=solver,
        )
        (model(x) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last_step is not None
        return optimizer.last_step.output_change

    # The step is linear in the weights, so that the first order is exact.
    assert first_change(Solver(products=products)) == pytest.approx(0.5, rel=1e-3)
    # The smaller one counts if a radius is given.
    assert first_change(Solver(products=products, radius=0.1)) == pytest.approx(0.1, rel=1e-3)


def test_margins_are_those_of_the_reference_of_now() -> None:
    held = anchors(torch.tensor([[3.0, 0.0], [5.0, 0.0]]))
    budget = Budget(max_flips=0.0)
    assert room_within(budget, held) == pytest.approx(math.pi * 2 * 3.0**2)
    held.extend(torch.tensor([[1.0, 0.0]]))
    assert room_within(budget, held) == pytest.approx(math.pi * 2 * 1.0**2)
