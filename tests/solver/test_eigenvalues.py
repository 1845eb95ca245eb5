"""The largest eigenvalues from products alone, each as often as it occurs, against the dense decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fipoptim.solver.eigenvalues import largest_eigenvalues


def found(
    eigenvalues: list[float], k: int, tol: float, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor | None, int]:
    """Returns the k largest eigenvalues found of a matrix with these eigenvalues, and the number of products used."""
    n, products = len(eigenvalues), 0
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    matrix = (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    matrix = ((matrix + matrix.T) / 2).to(dtype)

    def matvec(v: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return matrix @ v

    like = torch.empty(n, dtype=dtype)
    return largest_eigenvalues(matvec, like, k, tol=tol, max_products=50 * (k + 1)), products


@settings(max_examples=200, deadline=None)
@given(
    # A start with little of an eigenvector misses an eigenvalue that is near another one.
    values=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=8),
    null=st.integers(0, 30),
    log_scale=st.sampled_from([-20, 0, 20]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_each_eigenvalue_is_found_as_often_as_it_occurs(values, null, log_scale, dtype, seed, data):
    scale = 10.0**log_scale
    eigenvalues = [scale * value / 20 for value, times in values for _ in range(times)] + [
        0.0
    ] * null
    k = data.draw(st.integers(1, len(eigenvalues)))
    result, products = found(eigenvalues, k, 1e-4, dtype, seed)
    expected = torch.tensor(sorted(eigenvalues, reverse=True)[:k], dtype=torch.float64)
    assert result is not None
    assert products <= len(eigenvalues)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-4 * max(eigenvalues))


@pytest.mark.parametrize("k", [1, 2, 5, 8, 40])
@pytest.mark.parametrize("apart", [1e-7, 1e-3])
def test_close_eigenvalues_are_told_apart_as_far_as_the_tolerance_says(
    k: int, apart: float
) -> None:
    eigenvalues = [1.0, 1.0 - apart, 1.0 - 2 * apart, 1.0 - 2 * apart, 0.5, 0.5 - apart]
    eigenvalues += [0.1 * 0.8**i for i in range(34)]
    result, _ = found(eigenvalues, k, 1e-9)
    assert result is not None
    expected = torch.tensor(eigenvalues[:k], dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3, 12])
def test_a_zero_matrix_has_k_eigenvalues_of_zero(k: int) -> None:
    result, products = found([0.0] * 12, k, 1e-4)
    assert result is not None
    assert result.tolist() == [0.0] * k
    assert products <= 2


def test_a_second_start_takes_few_products_where_no_eigenvalue_repeats() -> None:
    eigenvalues = [0.7**i for i in range(20)] + [1e-3 * 0.99**i for i in range(300)]
    assert found(eigenvalues, 1, 1e-4)[1] <= 10
    assert found(eigenvalues, 5, 1e-4)[1] <= 24


def test_too_few_products_give_none() -> None:
    matrix = torch.diag(torch.linspace(0, 1, 200, dtype=torch.float64))
    for k, most in ((1, 5), (3, 5), (3, 20)):
        like = torch.empty(200, dtype=torch.float64)
        assert (
            largest_eigenvalues(lambda v: matrix @ v, like, k, tol=1e-9, max_products=most) is None
        )
    # The result is None too if the space is full before all copies of an eigenvalue are found.
    equal = torch.diag(torch.tensor([1.0] * 9 + [0.5] + [0.0] * 90))
    like = torch.empty(100)
    for most in range(1, 12):
        result = largest_eigenvalues(lambda v: equal @ v, like, 10, tol=1e-4, max_products=most)
        assert result is None
