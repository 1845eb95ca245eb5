r"""The density of the metric's eigenvalues, from products on the side of the weights or of the outputs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Generator, Tensor

from fipoptim.flat import FlatVectors
from fipoptim.mean import AnchorMean
from fipoptim.solver.density import SpectralDensity, spectral_density
from fipoptim.solver.space import Part, Space


class Products(Protocol):
    """What is asked of a metric."""

    flat: FlatVectors
    space: Space
    mean: AnchorMean

    @property
    def size(self) -> int:
        """The number n of weights."""

    @property
    def outputs(self) -> Tensor:
        """The outputs of this rank."""

    def matvec(self, v: Tensor) -> Tensor:
        """The product with g."""

    def jvp(self, v: Tensor) -> Tensor:
        """The product with J."""

    def vjp(self, u: Tensor) -> Tensor:
        """The product with its transpose."""


def density_of_metric(
    metric: Products, probes: int, steps: int, generator: Generator
) -> SpectralDensity:
    r"""The density of all eigenvalues of g.

    A quadrature of g would spend nodes on the zeros, which are most of the eigenvalues if there are fewer outputs than
    weights. :math:`\frac1N J J^\top` has the other eigenvalues, and fewer zeros or none.

    Args:
        metric: The metric.
        probes: The number of random vectors.
        steps: The most products for each.
        generator: Draws the vectors, on the CPU, alike on every rank.

    Raises:
        ValueError: If ``probes`` or ``steps`` is not positive.
    """
    how = {"probes": probes, "steps": steps}
    z, mean = metric.outputs, metric.mean
    shape = torch.Size([mean.count, z.shape[1]])
    if shape.numel() >= metric.size:
        return spectral_density(
            metric.matvec, metric.flat.zeros(), **how, generator=generator, vectors=metric.space
        )

    def product(u: Tensor) -> Tensor:
        return metric.jvp(metric.vjp(mean.weighted(u.view_as(z)))).reshape(-1)

    own = mean.ranks.share(mean.count)
    space = Space(mean.ranks, [Part(shape, 0, own.start, own.stop - own.start)])
    found = spectral_density(
        product, torch.zeros_like(z).reshape(-1), **how, generator=generator, vectors=space
    )
    return found.with_zeros(metric.size - found.size)
