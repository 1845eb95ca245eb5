"""A diagonal preconditioner."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fipoptim.solver.preconditioner import Preconditioner


class DiagonalPreconditioner(Preconditioner):
    """``P`` diagonal.

    Args:
        diagonal: Its diagonal, positive, shape ``(n,)``.
    """

    def __init__(self, diagonal: Tensor) -> None:
        self._diagonal = diagonal

    @cached_property
    def _inverse_root(self) -> Tensor:
        return self._diagonal.rsqrt()

    def inverse(self, v: Tensor) -> Tensor:
        """See :class:`Preconditioner`."""
        return v / self._diagonal

    def inverse_root(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Preconditioner`."""
        return torch.mul(self._inverse_root, v, out=out)

    def root(self, v: Tensor) -> Tensor:
        """See :class:`Preconditioner`."""
        return v / self._inverse_root
