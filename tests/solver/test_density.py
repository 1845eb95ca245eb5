"""Lanczos quadrature and the spectral density from products alone, against the dense decomposition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fipoptim.solver.density import SpectralDensity, lanczos_quadrature, spectral_density


def matrix_of(eigenvalues: list[float], seed: int) -> Tensor:
    """Returns a matrix with these eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    matrix = (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    return (matrix + matrix.T) / 2


EIGENVALUES = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-3, 1.0)), min_size=1, max_size=12
).filter(any)


@settings(max_examples=50, deadline=None)
@given(EIGENVALUES, st.integers(0, 1000), st.integers(1, 14), st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_moments_that_lanczos_steps_guarantee_are_exact(values, seed, steps, scale):
    matrix = matrix_of([scale * x for x in values], seed)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(values), generator=generator, dtype=torch.float64)
    nodes, weights = lanczos_quadrature(matrix.mv, start, steps)
    assert len(nodes) <= min(steps, len(values))
    assert bool((nodes >= 0).all())
    unit, moment = start / start.norm(), start / start.norm()
    for degree in range(2 * steps):
        expected = float(unit @ moment)
        assert float((weights * nodes**degree).sum()) == pytest.approx(
            expected, rel=1e-8, abs=1e-9 * (scale * max(values)) ** degree
        )
        moment = matrix @ moment


def test_a_whole_space_gives_the_eigenvalues_and_the_squared_components_of_the_start():
    values = [0.0, 0.1, 0.3, 0.3, 2.0]
    matrix = matrix_of(values, seed=0)
    start = torch.arange(1.0, 6.0, dtype=torch.float64)
    nodes, weights = lanczos_quadrature(matrix.mv, start, steps=20)
    torch.testing.assert_close(nodes, torch.tensor([0.0, 0.1, 0.3, 2.0], dtype=torch.float64))
    components = torch.linalg.eigh(matrix)[1].T @ (start / start.norm())
    squares = components.square()
    torch.testing.assert_close(
        weights, torch.stack([squares[0], squares[1], squares[2] + squares[3], squares[4]])
    )


def test_the_density_estimates_traces_and_tells_its_error():
    values = [2.0 * 0.8**k for k in range(60)]
    matrix = matrix_of(values, seed=1)
    found = spectral_density(
        matrix.mv,
        torch.empty(60, dtype=torch.float64),
        probes=200,
        steps=12,
        generator=torch.Generator().manual_seed(0),
    )
    assert found.size == 60
    assert found.products == 200 * 12
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(200, dtype=torch.float64))
    expected = sum(x / (x + 0.1) for x in values)
    for estimate, exact in (
        (found.trace(), sum(values)),
        (found.effective_dimension(0.1), expected),
    ):
        assert abs(estimate.value - exact) < 4 * estimate.error
        assert estimate.error < 0.05 * exact


def test_one_random_vector_has_no_error_to_tell():
    found = SpectralDensity(torch.ones(1, 1), torch.ones(1, 1), size=3, products=1)
    assert found.trace().value == 3.0
    assert math.isnan(found.trace().error)
    assert found.effective_dimension(0.5).value == pytest.approx(2.0)
    with pytest.raises(ValueError, match="mu: must be above 0, got 0"):
        found.effective_dimension(0)


def test_further_zeros_change_no_trace_of_what_vanishes_at_zero():
    found = SpectralDensity(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 0.75]]), 4, products=2)
    more = found.with_zeros(6)
    assert more.size == 10
    assert float(more.weights.sum()) == pytest.approx(1.0)
    assert more.trace().value == pytest.approx(found.trace().value) == pytest.approx(7.0)
    assert more.trace_of(torch.ones_like).value == pytest.approx(10.0)


def test_the_zero_operator_has_all_its_weight_at_zero():
    zero = torch.zeros(4, 4)
    seeded = torch.Generator().manual_seed(0)
    found = spectral_density(zero.mv, torch.empty(4), probes=2, steps=3, generator=seeded)
    assert found.nodes.tolist() == [[0.0] * 3] * 2
    assert found.weights[:, 0].tolist() == pytest.approx([1.0, 1.0])
    assert found.products == 2


@pytest.mark.parametrize("name", ["probes", "steps"])
def test_a_number_that_is_not_positive_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: must be a positive whole number, got 0"):
        spectral_density(
            torch.eye(2).mv,
            torch.empty(2),
            **{"probes": 1, "steps": 1, name: 0},
            generator=torch.Generator(),
        )
