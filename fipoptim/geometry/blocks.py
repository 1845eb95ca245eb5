"""A preconditioner in blocks, one for each tensor of weights: diagonal, or a matrix on the shorter side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fipoptim.flat import matrix_shape
from fipoptim.solver.preconditioner import Preconditioner

# The damping that is added to P, relative to the mean of its diagonal.
DAMPING = 1e-2


@dataclass(frozen=True)
class Sides:
    """P on the shorter sides of k matrices of weights; the sides are equally long.

    Attributes:
        members: The numbers of the blocks that these matrices are.
        values: The eigenvalues of P on each side, ``(k, side)``, in float64.
        vectors: The eigenvectors, ``(k, side, side)``, in float64.
    """

    members: list[int]
    values: Tensor
    vectors: Tensor


class BlockPreconditioner(Preconditioner):
    """P in blocks, one for each tensor of weights, damped and scaled so that its diagonal has a mean of 1.

    Args:
        shapes: The shapes of the tensors, in the order of the flat vectors.
        squares: :math:`P^2` before damping for each diagonal block, by its number, in the shape of the tensor.
        sides: P before damping for every other block.
        like: A tensor of the vectors' precision and device.
        stretch: A factor of :math:`P^{1/2}` for each block, applied last; None is 1 for all.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        squares: Mapping[int, Tensor],
        sides: Sequence[Sides],
        like: Tensor,
        stretch: Sequence[float] | None = None,
    ) -> None:
        self._shapes, self._like = list(shapes), like.new_empty(())
        self._sizes = [shape.numel() for shape in shapes]
        self._diagonals = sorted(squares)
        flat = [squares[k].reshape(-1).to(like) for k in self._diagonals]
        # The diagonals of all diagonal blocks, one after the other.
        self._diagonal = torch.cat(flat).sqrt_() if flat else like.new_empty(0)
        mean = self._trace(sides) / sum(self._sizes)
        # Without a linear term there is nothing to measure by, and P is the identity.
        some = mean > 0
        unit = torch.where(some, mean * (1 + DAMPING), 1.0)
        damping = torch.where(some, torch.full_like(mean, DAMPING / (1 + DAMPING)), 1.0)
        # In float32 the unit underflows if the whole diagonal does.
        unit_of_weights = unit.to(like).clamp_(min=torch.finfo(like.dtype).tiny)
        self._diagonal = torch.addcdiv(damping.to(like), self._diagonal, unit_of_weights)
        self._sides = [replace(g, values=g.values / unit + damping) for g in sides]
        if stretch is not None and any(factor != 1.0 for factor in stretch):
            blocks = dict(zip(self._diagonals, self._split(self._diagonal), strict=True))
            for group in self._sides:
                blocks |= zip(group.members, group.values, strict=True)
            torch._foreach_mul_(list(blocks.values()), [stretch[k] ** 2 for k in blocks])

    def _trace(self, sides: Sequence[Sides]) -> Tensor:
        """The trace of P before damping."""
        sums, times = [self._diagonal.sum().double()], [1.0]
        for group in sides:
            sums.extend(group.values.sum(dim=1))
            # P is the Kronecker product of the shorter side's matrix with the identity of the longer side, so each
            # eigenvalue counts as many times as the longer side is long.
            times.extend(float(max(matrix_shape(self._shapes[k]))) for k in group.members)
        return torch.stack(torch._foreach_mul(sums, times)).sum()

    def inverse(self, v: Tensor) -> Tensor:
        """See :class:`Preconditioner`."""
        if not self._sides:
            return v / self._diagonal
        result = v.clone()
        if self._diagonals:
            torch._foreach_div_(self._diagonal_blocks(result), self._split(self._diagonal))
        return self._times_matrices(result, self._matrices(-1.0))

    def inverse_root(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Preconditioner`."""
        return self._times(v, *self._inverse_roots, out=out)

    def root(self, v: Tensor) -> Tensor:
        """See :class:`Preconditioner`."""
        return self._times(v, self._diagonal.sqrt(), self._matrices(0.5))

    @cached_property
    def _inverse_roots(self) -> tuple[Tensor, dict[int, Tensor]]:
        return self._diagonal.rsqrt(), self._matrices(-0.5)

    def _matrices(self, power: float) -> dict[int, Tensor]:
        """P to a power, on the shorter side of each block that is a matrix."""
        found: dict[int, Tensor] = {}
        for group in self._sides:
            raised = group.vectors * group.values.pow(power)[:, None]
            found |= zip(group.members, (raised @ group.vectors.mT).to(self._like), strict=True)
        return found

    def _split(self, diagonal: Tensor) -> list[Tensor]:
        return list(diagonal.split([self._sizes[k] for k in self._diagonals]))

    def _diagonal_blocks(self, v: Tensor) -> list[Tensor]:
        """The blocks of ``v`` in which P is diagonal."""
        parts = v.split(self._sizes)
        return [parts[k] for k in self._diagonals]

    def _times(
        self,
        v: Tensor,
        diagonal: Tensor,
        matrices: Mapping[int, Tensor],
        out: Tensor | None = None,
    ) -> Tensor:
        """``v`` multiplied block by block, in ``out`` if it is given."""
        if not self._sides:
            return torch.mul(v, diagonal, out=out)
        result = v.clone() if out is None else out.copy_(v)
        if self._diagonals:
            torch._foreach_mul_(self._diagonal_blocks(result), self._split(diagonal))
        return self._times_matrices(result, matrices)

    def _times_matrices(self, v: Tensor, matrices: Mapping[int, Tensor]) -> Tensor:
        """``v``, with the blocks that are matrices multiplied in place."""
        parts = v.split(self._sizes)
        blocks = {k: parts[k].view(matrix_shape(self._shapes[k])) for k in matrices}
        products = [
            matrices[k] @ block if on_rows(self._shapes[k]) else block @ matrices[k]
            for k, block in blocks.items()
        ]
        torch._foreach_copy_(list(blocks.values()), products)
        return v


def on_rows(shape: torch.Size) -> bool:
    """Whether P of a matrix acts on its rows, as the shorter side, or on its columns."""
    rows, columns = matrix_shape(shape)
    return rows <= columns
