"""beta="auto": the weight that a run chooses for itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer
from fipoptim.automatic import spread_of
from fipoptim.mean import AnchorMean


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def inputs(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64)


def loss(model: nn.Module, scale: float = 1.0) -> Tensor:
    zeros = torch.zeros(16, dtype=torch.long)
    return scale * nn.functional.cross_entropy(model(inputs(16, 5) + 1), zeros)


def first_beta(
    model: nn.Module, scale: float = 1.0, max_drift: float | None = 10.0, **options: Any
) -> float:
    anchors = AnchorBatch(model, inputs(20, 0))
    optimizer = FIPOptimizer(
        model.parameters(), anchors, beta="auto", max_drift=max_drift, **options
    )
    assert optimizer.param_groups[0]["beta"] == "auto"
    loss(model, scale).backward()
    optimizer.step()
    return float(optimizer.param_groups[0]["beta"])


def test_the_weight_is_that_of_the_dense_formula() -> None:
    model = network()
    reference = model(inputs(20, 0)).detach()
    g = AnchorMetric(AnchorBatch(model, inputs(20, 0))).dense().double()
    loss(model).backward()
    b = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    model.zero_grad()
    curvature = float(b @ g @ b / (b @ b))
    s = float((reference - reference.mean(0)).square().sum(dim=1).mean())
    expected = 4 * 2 * (s * curvature) ** 0.5 / float(b.norm())
    assert first_beta(model) == pytest.approx(expected, rel=1e-6)
    # A budget is small below a 50th of the spread.
    for share in (0.5, 0.01):
        found = first_beta(network(), max_drift=share * s / 50)
        assert found == pytest.approx(share**1.5 * expected, rel=1e-6)


def test_the_length_of_a_step_does_not_enter() -> None:
    betas = {first_beta(network(), eps=eps, check_every=None) for eps in (0.01, 0.5)}
    assert len(betas) == 1


def test_the_strictest_bound_counts() -> None:
    flips = first_beta(network(), max_drift=None, max_flips=0.05)
    assert first_beta(network(), max_drift=10.0, max_flips=0.05) == flips
    assert first_beta(network(), max_drift=1e-6, max_flips=0.05) < flips


def test_units_do_not_matter() -> None:
    """A loss in other units has a gradient in other units, and the same path."""
    one, other = network(), network()
    beta = first_beta(one)
    assert first_beta(other, scale=100.0) == pytest.approx(beta / 100.0)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_gradient_of_zero_chooses_nothing() -> None:
    model = network()
    anchors = AnchorBatch(model, inputs(20, 0))
    optimizer = FIPOptimizer(model.parameters(), anchors, beta="auto", max_drift=0.1)
    loss(model, 0.0).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["beta"] == "auto"
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["beta"] > 0


def test_groups_with_a_weight_of_their_own_keep_it() -> None:
    model = network()
    groups = [
        {"params": list(model[0].parameters()), "beta": 3.0},
        {"params": list(model[2].parameters())},
    ]
    anchors = AnchorBatch(model, inputs(20, 0))
    optimizer = FIPOptimizer(groups, anchors, beta="auto", max_drift=0.1)
    loss(model).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["beta"] == 3.0
    assert float(optimizer.param_groups[1]["beta"]) > 0


def test_the_weight_is_in_the_state() -> None:
    model = network()
    old = copy.deepcopy(model)
    anchors = AnchorBatch(model, inputs(20, 0))
    optimizer = FIPOptimizer(model.parameters(), anchors, beta="auto", max_drift=0.1)
    fresh = optimizer.state_dict()
    loss(model).backward()
    optimizer.step()
    state = optimizer.state_dict()
    other = FIPOptimizer(
        old.parameters(), AnchorBatch(old, inputs(20, 0)), beta="auto", max_drift=0.1
    )
    other.load_state_dict(state)
    assert other.param_groups[0]["beta"] == optimizer.param_groups[0]["beta"]
    other.load_state_dict(fresh)
    assert other.param_groups[0]["beta"] == "auto"


def test_outputs_that_are_all_alike_spread_from_zero() -> None:
    assert spread_of(lambda: [torch.full((5, 2), 3.0)], AnchorMean(5)) == pytest.approx(18.0)
    assert spread_of(lambda: torch.tensor([[1.0], [3.0]]).split(1), AnchorMean(2)) == pytest.approx(
        1.0
    )
