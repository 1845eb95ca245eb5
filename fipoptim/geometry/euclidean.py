"""The Euclidean geometry: every weight counts alike, within groups of one step length."""

from __future__ import annotations

import torch
from torch import Tensor

from fipoptim.geometry.base import Geometry
from fipoptim.geometry.diagonal import DiagonalPreconditioner
from fipoptim.solver.preconditioner import Preconditioner


class Euclidean(Geometry):
    r""":math:`\sum_{groups} \|v_{group}\|^2 / lr_{group}^2 = 1`; it remembers nothing."""

    divisible = True

    def update(self, linear: Tensor, size: float, *, objective: bool) -> Preconditioner | None:
        """See :class:`Geometry`."""
        params, stretch = self.parameters.tensors, self.parameters.stretch
        if all(factor == 1.0 for factor in stretch):
            return None
        ratios = (torch.full_like(p, factor**2) for p, factor in zip(params, stretch, strict=True))
        return DiagonalPreconditioner(self.parameters.flat.flatten(ratios))
