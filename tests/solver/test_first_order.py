"""The step of Eq. 4 without products."""

from __future__ import annotations

import pytest
import torch
from sphere_problems import SCALES, diagonal, vector

from fipoptim.geometry.diagonal import DiagonalPreconditioner
from fipoptim.solver.first_order import first_order_step


def test_the_first_order_step_is_steepest_descent_with_the_length_asked_for() -> None:
    c, weight = vector(6, 0), vector(6, 1).abs() + 0.1
    v, gain = first_order_step(c, 0.3, DiagonalPreconditioner(weight))
    assert gain == pytest.approx(-float(c @ v), rel=1e-12)
    assert float((weight * v * v).sum().sqrt()) == pytest.approx(0.3, rel=1e-12)
    torch.testing.assert_close(v / v.norm(), -(c / weight) / (c / weight).norm())
    assert not first_order_step(torch.zeros(3), 0.3)[0].any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "scale"), [*SCALES, (torch.float32, 1e-40)])
def test_a_step_without_products_is_finite_if_its_gradient_is(
    dtype: torch.dtype, scale: float, weighted: bool
) -> None:
    c, weight = vector(50, 0).clamp(-3, 3), vector(50, 1).abs() + 0.01
    geometry = diagonal(weight.to(dtype) if weighted else None)
    expected, gain = first_order_step(c, 0.3, diagonal(weight if weighted else None))
    v, found = first_order_step((c * scale).to(dtype), 0.3, geometry)
    close = 1e-3 if scale == 1e-40 else 1e-6  # a gradient this small has few digits itself
    torch.testing.assert_close(v.double(), expected, rtol=0, atol=close)
    assert found == pytest.approx(gain * scale, rel=close)
