"""Eq. 4's direction does not depend on the scale of the gradient, however large or small its numbers are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, FIPOptimizer, Solver


def steps(scale: float, count: int = 3, **options: object) -> tuple[Tensor, FIPOptimizer]:
    """The weights after steps along gradients that are ``scale`` times those of a fixed loss."""
    torch.manual_seed(0)
    options = {"eps": 0.1, "drift_correction": False, "momentum": 0.5} | options
    dtype = options.pop("dtype", torch.float32)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    anchors = AnchorBatch(model, torch.randn(5, 4).to(dtype))
    optimizer = FIPOptimizer(model.parameters(), anchors, **options)
    for i in range(count):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
        model(x.to(dtype)).square().mean().backward()
        for p in model.parameters():
            p.grad.mul_(scale)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer


# float32 scales exactly by powers of two. The squares of 2^83, about 1e25, are beyond float32.
@pytest.mark.parametrize("products", [0, 3])
@pytest.mark.parametrize("precondition", [None, "adam", "muon"])
@pytest.mark.parametrize("exponent", [40, 83, 110])
def test_a_very_large_gradient_gives_the_same_step_as_a_moderate_one(
    exponent: int, precondition: str | None, products: int
) -> None:
    options = {"precondition": precondition, "solver": Solver(products=products)}
    if products:  # with products only beta / eps turns the step, so beta cancels the scale
        expected, _ = steps(1.0, beta=2.0**20, **options)
        found, optimizer = steps(2.0**exponent, beta=2.0 ** (20 - exponent), **options)
    else:
        expected, _ = steps(1.0, **options)
        found, optimizer = steps(2.0**exponent, **options)
    assert torch.isfinite(found).all()
    # After the first step the running means of squares may have been cut at the largest float32 number.
    one_expected, one = (
        steps(s, 1, beta=b, **options)[0]
        for s, b in ((1.0, 2.0**20), (2.0**exponent, 2.0 ** (20 - exponent)))
    )
    torch.testing.assert_close(one, one_expected, rtol=1e-4, atol=1e-5)
    if precondition is None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    kept = [t for state in optimizer.state.values() for t in state.values()]
    assert all(bool(torch.isfinite(t).all()) for t in kept)


@pytest.mark.parametrize("precondition", [None, "adam", "muon"])
@pytest.mark.parametrize("exponent", [-40, -83, -95])
def test_a_very_small_gradient_gives_the_same_step_as_a_moderate_one(
    exponent: int, precondition: str | None
) -> None:
    # There is no momentum, because its running mean treats numbers below 1e-31 as zero.
    options = {"precondition": precondition, "solver": Solver(products=0), "momentum": 0.0}
    expected, _ = steps(1.0, 1, **options)
    found, optimizer = steps(2.0**exponent, 1, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precondition", ["adam", "muon"])
def test_a_run_with_some_extreme_gradients_stays_finite(precondition: str) -> None:
    _, optimizer = steps(1.0, 2, precondition=precondition)
    model = optimizer.anchors.model
    for scale in (2.0**83, 2.0**-100, 1.0):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        for p in model.parameters():
            p.grad.mul_(scale)
        optimizer.step()
        assert 0 < optimizer.last_step.step_norm < 1
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("precondition", [None, "adam", "muon"])
@pytest.mark.parametrize("exponent", [-540, 540])
def test_float64_gradients_whose_squares_overflow_or_underflow_give_the_same_step(
    exponent: int, precondition: str | None
) -> None:
    options = {
        "precondition": precondition,
        "solver": Solver(products=0),
        "momentum": 0.0,
        "dtype": torch.float64,
    }
    expected, _ = steps(1.0, 2, **options)
    found, _ = steps(2.0**exponent, 2, **options)
    if precondition is None:
        torch.testing.assert_close(found, expected)
    first, one = (steps(scale, 1, **options)[0] for scale in (1.0, 2.0**exponent))
    torch.testing.assert_close(one, first)
    assert torch.isfinite(found).all()
