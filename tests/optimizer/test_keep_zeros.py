"""A pruned network stays pruned if keep_zeros is set."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver
from fipoptim.geometry import GEOMETRIES, DiagonalGeometry

PRECONDITIONS = [None, "adam", "muon"]


class Sizes(DiagonalGeometry):
    """A geometry from outside the package."""

    def diagonal(self, linear: Tensor) -> Tensor:
        return 1 + linear.abs()


def pruned() -> tuple[nn.Sequential, Tensor]:
    """Returns a network with half of its first layer's weights at zero, and the mask of these weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 15), nn.Tanh(), nn.Linear(15, 3))
    zeros = torch.rand(15, 10) < 0.5
    with torch.no_grad():
        model[0].weight.masked_fill_(zeros, 0.0)
        model[0].weight[0, 0] = -0.0 if zeros[0, 0] else model[0].weight[0, 0]
    return model, zeros


def optimizer_of(model: nn.Module, **options: Any) -> FIPOptimizer:
    anchors = AnchorBatch(
        model, torch.randn(30, 10), batch_size=20, generator=torch.Generator().manual_seed(0)
    )
    return FIPOptimizer(model.parameters(), anchors, eps=0.1, momentum=0.5, **options)


@pytest.mark.parametrize("max_drift", [None, 1e-3])
@pytest.mark.parametrize("products", [0, 3, "adaptive"])
@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_zeros_stay_and_all_else_moves(
    precondition: str | None, products: int | str, max_drift: float | None
) -> None:
    model, zeros = pruned()
    optimizer = optimizer_of(
        model,
        precondition=precondition,
        solver=Solver(products=products),
        max_drift=max_drift,
        keep_zeros=True,
    )
    start = copy.deepcopy(model)
    for gradient in (True, True, True, False):  # the last step has no objective
        optimizer.zero_grad()
        if gradient:
            model(torch.randn(8, 10)).square().sum().backward()
        optimizer.step()
    assert not model[0].weight[zeros].any()
    assert bool((model[0].weight != start[0].weight)[~zeros].all())
    assert bool((model[2].weight != start[2].weight).all())


def test_masking_the_gradient_does_not_keep_zeros_without_keep_zeros() -> None:
    # The restoring term is not part of .grad, so a hook on the gradient does not see it.
    model, zeros = pruned()
    optimizer = optimizer_of(model)
    model[0].weight.register_hook(lambda gradient: gradient * ~zeros)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 10)).square().sum().backward()
        optimizer.step()
    assert model[0].weight[zeros].any()


@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_masks_of_torch_prune_hold_by_themselves(precondition: str | None) -> None:
    model, zeros = pruned()
    prune.custom_from_mask(model[0], "weight", ~zeros)
    optimizer = optimizer_of(model, precondition=precondition, solver=Solver(products=3))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 10)).square().sum().backward()
        optimizer.step()
    assert optimizer.last_step.drift > 0
    prune.remove(model[0], "weight")
    assert not model[0].weight[zeros].any()


def test_keep_zeros_may_be_set_for_one_group_and_zeros_may_be_added_later() -> None:
    model, zeros = pruned()
    anchors = AnchorBatch(model, torch.randn(30, 10))
    optimizer = FIPOptimizer(
        [
            {"params": model[0].parameters(), "keep_zeros": True},
            {"params": model[2].parameters()},
        ],
        anchors,
        eps=0.1,
    )
    with torch.no_grad():
        model[2].weight[0] = 0.0
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 10)).square().sum().backward()
        optimizer.step()
    assert not model[0].weight[zeros].any()
    assert bool((model[2].weight[0] != 0).all())
    with torch.no_grad():
        model[0].weight[3] = 0.0
    optimizer.step()
    assert not model[0].weight[3].any()


def test_the_metric_and_the_step_are_restricted_to_the_weights_that_move() -> None:
    model, zeros = pruned()
    model = model.double()
    x = torch.randn(30, 10, dtype=torch.float64)
    anchors = AnchorBatch(model, x)
    params = list(model.parameters())
    held = [p == 0 for p in params]
    free = ~torch.cat([mask.flatten() for mask in held])
    whole, part = AnchorMetric(anchors), AnchorMetric(anchors, frozen=held)
    g = whole.dense() * free[:, None] * free[None, :]
    torch.testing.assert_close(part.dense(), g)
    torch.testing.assert_close(part.diagonal(), g.diagonal())
    v = torch.randn(part.size, dtype=torch.float64)
    torch.testing.assert_close(part.jvp(v), whole.jvp(v * free))

    # Eq. 4 over the weights that move, solved densely: (g + mu) v = -b/2 with ||v|| = eps.
    optimizer = FIPOptimizer(
        params, anchors, eps=0.05, keep_zeros=True, solver=Solver(products=200, tol=1e-12)
    )
    model(x.flip(0) * 0.5).square().sum().backward()
    b = part.flatten(p.grad for p in params) * free
    start = part.flatten(params).clone()
    optimizer.step()
    found = part.flatten(params) - start
    mu = optimizer.last_step.multiplier
    system = g + mu * torch.eye(part.size, dtype=torch.float64)
    expected = torch.linalg.solve(system, -b / 2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert float(found.norm()) == pytest.approx(0.05)


@pytest.mark.parametrize("products", [0, 3])
@pytest.mark.parametrize("precondition", PRECONDITIONS)
def test_weights_that_become_zero_on_the_way_stay_though_a_running_mean_remembers_them(
    precondition: str | None, products: int
) -> None:
    model, zeros = pruned()
    optimizer = optimizer_of(
        model, precondition=precondition, solver=Solver(products=products), keep_zeros=True
    )

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 10)).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step()
    with torch.no_grad():
        model[0].weight[3:6] = 0.0
    for _ in range(3):
        step()
        assert not model[0].weight[3:6].any()
    optimizer.zero_grad()
    optimizer.step()  # L = 0
    assert not model[0].weight[3:6].any()
    assert bool((model[2].weight != 0).all())


@pytest.mark.parametrize("max_products", [0, 8])
def test_settling_does_not_bring_weights_back_that_became_zero_on_the_way(
    max_products: int,
) -> None:
    model, _ = pruned()
    optimizer = optimizer_of(model, max_drift=0.05, check_every=None, keep_zeros=True)
    for step in range(12):
        optimizer.zero_grad()
        model(torch.randn(8, 10)).square().sum().backward()
        optimizer.step()
        if step == 6:
            with torch.no_grad():
                model[0].weight[3, :2] = 0.0
    assert optimizer.anchors.drift() > 0.05
    settled = optimizer.settle(max_products)
    assert settled.within
    assert optimizer.anchors.drift() <= 0.05
    assert not model[0].weight[3, :2].any()


@pytest.mark.parametrize("products", [0, 3])
@pytest.mark.parametrize("precondition", [*PRECONDITIONS, "sizes"])
def test_a_pruned_network_takes_the_steps_of_what_is_left(
    precondition: str | None, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GEOMETRIES, "sizes", Sizes)
    torch.manual_seed(0)
    inputs, others = torch.randn(20, 10).double(), torch.randn(8, 10).double()
    wide = nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    narrow = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    narrow.load_state_dict({**wide.state_dict(), "0.weight": wide[0].weight[:, :2].detach()})
    with torch.no_grad():
        wide[0].weight[:, 2:] = 0.0
    for model, columns in ((wide, 10), (narrow, 2)):
        optimizer = FIPOptimizer(
            [{"params": list(model.parameters()), "matrix": False if model is narrow else None}],
            AnchorBatch(model, inputs[:, :columns]),
            eps=0.1,
            momentum=0.5,
            precondition=precondition,
            solver=Solver(products=products, tol=1e-12),
            keep_zeros=model is wide,
        )
        for _ in range(3):
            optimizer.zero_grad()
            model(others[:, :columns]).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(wide[0].weight[:, :2], narrow[0].weight)
    torch.testing.assert_close(wide[2].weight, narrow[2].weight)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_keep_zeros_must_be_true_or_false(value: object) -> None:
    model, _ = pruned()
    with pytest.raises(TypeError, match="^keep_zeros: must be True or False"):
        optimizer_of(model, keep_zeros=value)
