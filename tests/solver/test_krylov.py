"""Krylov spaces of a symmetric operator."""

from __future__ import annotations

import pytest
import torch
from sphere_problems import psd, vector

from fipoptim.solver.krylov import KrylovSpace


def test_a_krylov_space_of_two_starts_is_orthonormal_and_invariant() -> None:
    a = psd(30, 7, 0)
    space = KrylovSpace(lambda v: a @ v, 30)
    space.add_start(vector(30, 1))
    for _ in range(4):
        assert space.extend()
    space.add_start(vector(30, 2))
    while space.extend():
        pass
    assert space.exhausted
    assert space.size == 9  # dimensions of the range, and one null direction for each start
    q = torch.stack([space.combine(e) for e in torch.eye(9, dtype=torch.float64)])
    torch.testing.assert_close(q @ q.T, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(q @ a @ q.T, space.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(a @ q.T, q.T @ space.T, rtol=0, atol=1e-10)


def test_a_krylov_basis_of_long_positive_vectors_is_orthonormal_to_float32_precision() -> None:
    n = 2**20 + 3
    generator = torch.Generator().manual_seed(0)
    diagonal, start, other = torch.rand(3, n, generator=generator)

    def quadratic(q: torch.Tensor) -> float:
        return float((diagonal.double() * q.double().square()).sum())

    space = KrylovSpace(lambda v: diagonal * v, 6, quadratic)
    space.add_start(start)
    for _ in range(3):
        assert space.extend()
    space.add_start(other)
    while space.extend():
        pass
    assert space.closed
    q = torch.stack([space.combine(e) for e in torch.eye(6, dtype=torch.float64)]).double()
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(q @ q.T, identity, rtol=0, atol=2e-6)
    torch.testing.assert_close((q * diagonal) @ q.T, space.T, rtol=0, atol=2e-6)
    torch.testing.assert_close(space.coordinates(other), q @ other.double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-34, 1e-25, 1e25, 1e36])
def test_products_near_the_limits_of_float32_are_projected_accurately(scale: float) -> None:
    g = psd(30, 7, 0).float()
    spaces = []
    for factor in (1.0, scale):
        matrix = g.double() * factor
        space = KrylovSpace(lambda v, m=matrix: (m @ v.double()).float(), 12)
        space.add_start(vector(30, 1).float())
        while space.extend():
            pass
        spaces.append(space.T / factor)
    torch.testing.assert_close(
        *(torch.linalg.eigvalsh(T)[-5:] for T in spaces), rtol=1e-4, atol=1e-6
    )
