"""Adam's geometry: each weight is measured by the root of the running mean of its squared linear term."""

from __future__ import annotations

from torch import Tensor

from fipoptim.geometry.base import Geometry
from fipoptim.geometry.blocks import BlockPreconditioner
from fipoptim.geometry.running_means import running_squares
from fipoptim.solver.preconditioner import Preconditioner


class Adam(Geometry):
    """``P`` diagonal, proportional to the damped root of the running mean of :math:`c^2` (Kingma and Ba, 2015)."""

    divisible = True

    @classmethod
    def entries(cls, p: Tensor, matrix: bool | None) -> tuple[str, ...]:
        """See :class:`Geometry`."""
        return ("exp_avg_sq",)

    @classmethod
    def kind(cls, p: Tensor, matrix: bool | None) -> str:
        """See :class:`Geometry`."""
        return "squares"

    def update(self, linear: Tensor, size: float, *, objective: bool) -> Preconditioner:
        """See :class:`Geometry`."""
        parts = self.parameters.flat.unflatten(linear)
        every = range(len(self.parameters))
        space = self.parameters.space
        squares, _ = running_squares(parts, every, size, self.memory, space)
        shapes = [p.shape for p in self.parameters.tensors]
        return BlockPreconditioner(
            shapes,
            dict(enumerate(squares)),
            [],
            linear,
            self.parameters.stretch,
            space,
            self.parameters.zeros,
        )
