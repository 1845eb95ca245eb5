"""Random problems of Eq. 4, and its solution by products."""

from __future__ import annotations

import torch

from fipoptim.geometry.diagonal import DiagonalPreconditioner
from fipoptim.solver.sphere import SphereSolution, solve_on_sphere

# Precisions with scales near the ends of what they can hold.
SCALES = [
    *[(torch.float32, x) for x in (1e38, 1e25, 1e-25, 1e-36)],
    *[(torch.float64, x) for x in (1e200, 1e-200)],
]


def psd(n: int, rank: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """A random positive semi-definite matrix with eigenvalues over three decades."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    eigenvalues = torch.zeros(n, dtype=torch.float64)
    eigenvalues[:rank] = scale * torch.logspace(0, -3, max(rank, 1), dtype=torch.float64)[:rank]
    g = q @ torch.diag(eigenvalues) @ q.T
    return (g + g.T) / 2


def vector(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagonal(weight: torch.Tensor | None) -> DiagonalPreconditioner | None:
    return None if weight is None else DiagonalPreconditioner(weight)


def solve(g: torch.Tensor, c: torch.Tensor, length: float, **options: object) -> SphereSolution:
    options = {
        "max_products": 10 * len(c),
        "tol": 1e-14,
        "direction": lambda: vector(len(c), 99),
    } | options
    return solve_on_sphere(lambda v: g @ v, c, length, **options)  # type: ignore[arg-type]
