"""Lengths and inner products of long flat vectors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fipoptim.solver.space import WHOLE
from fipoptim.solver.vectors import norm


def exact(v: torch.Tensor, w: torch.Tensor) -> tuple[float, float]:
    """Returns the inner product and the sum of the absolute products, both summed without rounding."""
    products = (v.double() * w.double()).tolist()
    return math.fsum(products), math.fsum(map(abs, products))


@settings(max_examples=50, deadline=None)
@given(
    length=st.sampled_from([1, 7, 2**20 + 3]),
    log_scale=st.integers(-25, 15),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    signs=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_inner_products_neither_underflow_nor_overflow(length, log_scale, dtype, signs, seed):
    generator = torch.Generator().manual_seed(seed)
    v, w = torch.rand(2, length, generator=generator, dtype=torch.float64) * 10.0**log_scale
    v, w = (v - 0.5 * signs * 10.0**log_scale).to(dtype), w.to(dtype)
    expected, size = exact(v, w)
    assert abs(WHOLE.inner(v, w) - expected) <= (5e-6 if dtype == torch.float32 else 1e-13) * size


def test_a_million_numbers_are_added_as_precisely_as_a_few() -> None:
    # All entries have one sign, so the errors of a single running float32 sum would not average out.
    generator = torch.Generator().manual_seed(0)
    v, w = torch.rand(2, 1_048_579, generator=generator, dtype=torch.float64).float()
    assert WHOLE.inner(v, w) == pytest.approx(exact(v, w)[0], rel=5e-6)
    assert WHOLE.inner(v, w) == pytest.approx(261906.82, rel=1e-6)
    assert norm(v) == pytest.approx(math.sqrt(exact(v, v)[0]), rel=1e-6)


@pytest.mark.parametrize("length", [1, 3, 1000])
@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        *[(torch.float32, x) for x in (3e38, 1e25, 1e-15, 1e-25, 1e-38, 1e-44)],
        *[(torch.float64, x) for x in (1e300, 1e160, 1e-20, 1e-160, 1e-300, 1e-320)],
    ],
)
def test_a_norm_is_right_whatever_the_size_of_its_entries(
    dtype: torch.dtype, largest: float, length: int
) -> None:
    v = (torch.linspace(-1, 1, length, dtype=torch.float64) * largest).to(dtype)
    expected = math.hypot(*v.tolist())
    rel = 1e-6 if dtype == torch.float32 else 1e-12
    assert norm(v) == pytest.approx(expected, rel=rel)
    direction, size = WHOLE.unit(v)
    assert size == norm(v)
    exactly = v.double() / v.double().abs().max()
    exactly /= exactly.norm()
    torch.testing.assert_close(direction.double(), exactly, rtol=0, atol=2 * rel)
    v[length // 2] = math.inf
    assert norm(v) == math.inf
    v[0] = math.nan
    assert math.isnan(norm(v))


def test_the_norm_of_nothing_is_zero() -> None:
    for v in (torch.zeros(0), torch.zeros(5), torch.zeros(300, dtype=torch.float64)):
        assert norm(v) == 0.0
        assert torch.equal(WHOLE.unit(v)[0], v)
        assert WHOLE.unit(v)[1] == 0.0
