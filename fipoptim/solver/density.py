r"""The spectral density of a symmetric positive semi-definite operator, from products alone.

Stochastic Lanczos quadrature (Ubaru, Chen and Saad, *SIAM J. Matrix Anal. Appl.* 38, 2017): for a unit vector ``q``,
:math:`q^\top f(A) q` is a sum over the eigenvalues, with the squared components of ``q`` as weights. Lanczos steps from
``q`` give its Gauss quadrature. The mean over random ``q`` is :math:`\operatorname{tr} f(A) / n`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fipoptim.solver.krylov import KrylovSpace, MatVec
from fipoptim.solver.space import WHOLE, Space


class Estimate(NamedTuple):
    """A number that was estimated from random vectors.

    Attributes:
        value: The mean over the vectors.
        error: Its standard error; NaN if there was one vector only.
    """

    value: float
    error: float


@dataclass(frozen=True)
class SpectralDensity:
    r"""Nodes and weights of the density of eigenvalues, :math:`\frac1n \sum_i \delta(\lambda - \lambda_i)`.

    Attributes:
        nodes: The nodes of each random vector, at least 0, shape ``(probes, steps)``, float64 on the CPU.
        weights: Their weights, of the same shape; those of each random vector sum to 1. A space that was invariant
            after fewer steps has fewer nodes; the others have the weight 0.
        size: The number n of eigenvalues.
        products: The number of products taken.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    products: int

    def with_zeros(self, count: int) -> SpectralDensity:
        """The density of the same eigenvalues and ``count`` more, which are 0."""
        size, zeros = self.size + count, torch.zeros_like(self.nodes[:, :1])
        return SpectralDensity(
            torch.cat([zeros, self.nodes], dim=1),
            torch.cat([zeros + count / size, self.weights * (self.size / size)], dim=1),
            size,
            self.products,
        )

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        r"""The trace of :math:`f(A)`, which is :math:`\sum_i f(\lambda_i)`.

        Args:
            function: ``f``, for a tensor of eigenvalues; finite from 0 on.
        """
        probes = len(self.nodes)
        found = self.size * (self.weights * function(self.nodes)).sum(dim=1)
        error = float(found.std()) / math.sqrt(probes) if probes > 1 else math.nan
        return Estimate(float(found.mean()), error)

    def trace(self) -> Estimate:
        """The trace of A, the sum of its eigenvalues."""
        return self.trace_of(lambda x: x)

    def effective_dimension(self, mu: float) -> Estimate:
        r"""Directions with an eigenvalue beyond ``mu``, softly counted: :math:`\operatorname{tr} A (A + \mu I)^{-1}`.

        Args:
            mu: The damping, above 0, in the unit of the eigenvalues.

        Raises:
            ValueError: If ``mu`` is not positive.
        """
        if not mu > 0:
            raise ValueError(f"mu: must be above 0, got {mu!r}.")
        return self.trace_of(lambda x: x / (x + mu))


def lanczos_quadrature(
    matvec: MatVec, start: Tensor, steps: int, *, vectors: Space = WHOLE
) -> tuple[Tensor, Tensor]:
    r"""The Gauss quadrature of :math:`b^\top f(A) b / \|b\|^2`, exact for polynomials of degree ``2 steps - 1``.

    Args:
        matvec: The product with the operator; vectors have shape ``(n,)``. Its result is written to.
        start: The vector ``b``, shape ``(n,)``, not zero.
        steps: The most products to take.
        vectors: The space of the vectors, which may be divided among ranks.

    Returns:
        Nodes, ascending, and weights, which sum to 1: shape ``(k,)`` each, float64 on the CPU, with ``k <= steps``.
        There are fewer if the Krylov space of ``b`` is smaller; then the sum is exact for every ``f``.
    """
    space = KrylovSpace(matvec, min(steps, vectors.size(start)), space=vectors)
    space.add_start(start)
    while space.extend():
        pass
    nodes, components = torch.linalg.eigh(space.T)
    return nodes.clamp(min=0), components[0].square()  # below 0 is rounding


def spectral_density(
    matvec: MatVec,
    like: Tensor,
    *,
    probes: int,
    steps: int,
    generator: Generator,
    vectors: Space = WHOLE,
) -> SpectralDensity:
    """The density by stochastic Lanczos quadrature from normal random vectors.

    Args:
        matvec: The product with the operator; vectors have shape ``(n,)``. Its result is written to.
        like: A tensor of the vectors' size ``(n,)``, precision and device.
        probes: The number of random vectors.
        steps: The most products for each.
        generator: Draws the vectors, on the CPU.
        vectors: The space of the vectors, which may be divided among ranks.

    Raises:
        ValueError: If ``probes`` or ``steps`` is not positive.
    """
    for name, number in (("probes", probes), ("steps", steps)):
        if number < 1:
            raise ValueError(f"{name}: must be a positive whole number, got {number!r}.")
    nodes = torch.zeros(probes, steps, dtype=torch.float64, device="cpu")
    weights, products = torch.zeros_like(nodes), 0
    for k in range(probes):
        start = vectors.random(like, generator)
        own_nodes, own_weights = lanczos_quadrature(matvec, start, steps, vectors=vectors)
        nodes[k, : len(own_nodes)], weights[k, : len(own_nodes)] = own_nodes, own_weights
        products += len(own_nodes)
    return SpectralDensity(nodes, weights, vectors.size(like), products)
