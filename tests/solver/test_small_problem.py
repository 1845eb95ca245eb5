"""Eq. 4 in a space of few dimensions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sphere_problems import psd, vector

from fipoptim.solver.small_problem import small_problem


@settings(max_examples=100, deadline=None)
@given(k=st.integers(1, 8), seed=st.integers(0, 10_000), log_length=st.floats(-12, 12))
def test_the_small_problem_is_solved_to_machine_precision(
    k: int, seed: int, log_length: float
) -> None:
    t, a, length = psd(k, k, seed), vector(k, seed + 1), 10.0**log_length
    assume(float(a.norm()) > 1e-3)
    small = small_problem(t, a, length)
    assert float(small.h.norm()) == pytest.approx(length, rel=1e-14)
    gradient = 2 * (t @ small.h + small.multiplier * small.h) + a
    size = 2 * float((t @ small.h).norm()) + 2 * abs(small.multiplier) * length + float(a.norm())
    assert float(gradient.norm()) <= 1e-12 * size
    assert small.multiplier >= -float(torch.linalg.eigvalsh(t)[0]) * (1 + 1e-12)
