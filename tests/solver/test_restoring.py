"""Restoring steps from products alone, against the dense solution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fipoptim.solver.restoring import LEAST_DAMPING, RestoringSteps


def problem(n: int, rows: int, seed: int, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """A Jacobian over the root of N, the metric, half the gradient of the drift, and the drift."""
    generator = torch.Generator().manual_seed(seed)
    jacobian = scale * torch.randn(rows, n, generator=generator, dtype=torch.float64)
    residual = torch.randn(rows, generator=generator, dtype=torch.float64)
    g = jacobian.T @ jacobian
    return jacobian, g, jacobian.T @ residual, float(residual @ residual)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 15),
    st.integers(1, 20),
    st.integers(0, 10_000),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.floats(-3, 3),
)
def test_each_step_is_the_dense_one_and_leaves_the_predicted_drift(
    n: int, rows: int, seed: int, scale: float, log_damping: float
) -> None:
    jacobian, g, gradient, drift = problem(n, rows, seed, scale)
    steps = RestoringSteps(lambda v: g @ v, gradient, drift, max_products=n, tol=0.0)
    damping = steps.least_damping * 10.0**log_damping
    v = steps.step(damping)
    expected = np.linalg.solve(g.numpy() + damping * np.eye(n), -gradient.numpy())
    np.testing.assert_allclose(v.numpy(), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    residual = torch.randn(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    torch.randn(rows, n, generator=generator, dtype=torch.float64)
    residual = torch.randn(rows, generator=generator, dtype=torch.float64)
    left = float((residual + jacobian @ v).square().sum())
    assert steps.predicted(damping) == pytest.approx(left, rel=1e-6, abs=1e-9 * drift)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 15), st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_the_damping_for_a_drift_is_that_of_the_shortest_step(
    n: int, seed: int, part: float
) -> None:
    _, g, gradient, drift = problem(n, n, seed, 1.0)
    steps = RestoringSteps(lambda v: g @ v, gradient, drift, max_products=n, tol=0.0)
    least = steps.predicted(steps.least_damping)
    wanted = least + part * (drift - least)
    damping = steps.damping_for(wanted)
    assert steps.predicted(damping) == pytest.approx(wanted, rel=1e-5)
    assert steps.predicted(damping) <= wanted
    assert steps.step(damping).norm() <= steps.step(damping / 2).norm()


def test_a_drift_out_of_reach_takes_the_least_damping() -> None:
    _, g, gradient, drift = problem(5, 20, 0, 1.0)  # more outputs than weights
    steps = RestoringSteps(lambda v: g @ v, gradient, drift)
    assert steps.least_damping == pytest.approx(
        LEAST_DAMPING * float(gradient @ g @ gradient) / float(gradient @ gradient)
    )
    assert steps.damping_for(0.0) == steps.least_damping


def test_products_are_counted_and_stop_on_convergence() -> None:
    _, g, gradient, drift = problem(12, 3, 0, 1.0)  # rank 3: three products span everything
    calls = []

    def matvec(v: Tensor) -> Tensor:
        calls.append(1)
        return g @ v

    steps = RestoringSteps(matvec, gradient, drift, max_products=8)
    assert steps.products == len(calls) == 3
    assert RestoringSteps(matvec, gradient, drift, max_products=2).products == 2


def test_without_a_gradient_there_is_no_step() -> None:
    assert RestoringSteps(lambda v: v, torch.zeros(4), 1.0).products == 0
