"""A preconditioner in blocks, one for each tensor of weights: diagonal, or a matrix on the shorter side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fipoptim.flat import matrix_shape
from fipoptim.geometry.sides import Sides, on_rows
from fipoptim.solver.preconditioner import Preconditioner
from fipoptim.solver.space import WHOLE, Space

# The damping that is added to P, relative to the mean of its diagonal.
DAMPING = 1e-2


class BlockPreconditioner(Preconditioner):
    """P in blocks, one for each tensor of weights, damped and scaled so that its diagonal has a mean of about 1.

    The mean is over the weights that move, so that a network of which nine tenths are pruned takes the steps of the
    network that is left.

    Args:
        shapes: The shapes of the tensors, in the order of the flat vectors.
        squares: :math:`P^2` before damping for each diagonal block, by its number, in the shape of the tensor.
        sides: P before damping for every other block.
        like: A tensor of the vectors' precision and device.
        stretch: A factor of :math:`P^{1/2}` for each block, applied last; None is 1 for all.
        space: The space of the vectors. If it is divided among ranks, blocks are diagonal, and each rank gives the part
            that it has of them.
        frozen: For each tensor of weights a bool tensor of its shape, True at weights that do not move, all of which
            are in diagonal blocks; None if all weights move.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        squares: Mapping[int, Tensor],
        sides: Sequence[Sides],
        like: Tensor,
        stretch: Sequence[float] | None = None,
        space: Space = WHOLE,
        frozen: Sequence[Tensor] | None = None,
    ) -> None:
        self._shapes, self._like = list(shapes), like.new_empty(())
        self._sizes = [shape.numel() for shape in shapes]
        self._diagonals = sorted(squares)
        flat = [squares[k].reshape(-1).to(like) for k in self._diagonals]
        if frozen is not None:
            zeros = [frozen[k].reshape(-1) for k in self._diagonals]
            flat = [square * ~z for square, z in zip(flat, zeros, strict=True)]
        # The diagonals of all diagonal blocks, one after the other.
        self._diagonal = torch.cat(flat).sqrt_() if flat else like.new_empty(0)
        mean = self._mean(sides, space, frozen or ())
        # Without a linear term there is nothing to measure by, and P is the identity.
        some = mean > 0
        unit = torch.where(some, mean * (1 + DAMPING), 1.0)
        damping = torch.where(some, torch.full_like(mean, DAMPING / (1 + DAMPING)), 1.0)
        # In float32 the unit underflows if the whole diagonal does.
        unit_of_weights = unit.to(like).clamp_(min=torch.finfo(like.dtype).tiny)
        self._diagonal = torch.addcdiv(damping.to(like), self._diagonal, unit_of_weights)
        factors = [1.0] * len(shapes) if stretch is None else [factor**2 for factor in stretch]
        self._sides = [g.damped(unit, damping, [factors[k] for k in g.members]) for g in sides]
        if self._diagonals and any(factor != 1.0 for factor in factors):
            blocks = self._split(self._diagonal)
            torch._foreach_mul_(blocks, [factors[k] for k in self._diagonals])

    def _mean(self, sides: Sequence[Sides], space: Space, frozen: Sequence[Tensor]) -> Tensor:
        """The mean of the diagonal of P before damping."""
        held = sum(zeros.sum().to(self._like.device) for zeros in frozen)
        moving = sum(self._sizes) - held
        if not space.whole:
            trace, count = space.sums(float(self._diagonal.sum(dtype=torch.float64)), float(moving))
            return torch.tensor(
                trace / max(count, 1.0), dtype=torch.float64, device=self._diagonal.device
            )
        sums, times = [self._diagonal.sum().double()], [1.0]
        for group in sides:
            sums.extend(group.traces())
            # P is the Kronecker product of the shorter side's matrix with the identity of the longer side, so each
            # eigenvalue counts as many times as the longer side is long.
            times.extend(float(max(matrix_shape(self._shapes[k]))) for k in group.members)
        return torch.stack(torch._foreach_mul(sums, times)).sum() / moving

    def inverse(self, v: Tensor) -> Tensor:
        """See :class:`Preconditioner`."""
        if not self._sides:
            return v / self._diagonal
        result = v.clone()
        if self._diagonals:
            torch._foreach_div_(self._diagonal_blocks(result), self._split(self._diagonal))
        return self._times_matrices(result, self._of_blocks(lambda g: g.inverses()))

    def root(self, v: Tensor) -> Tensor:
        """See :class:`Preconditioner`."""
        return self._times(v, self._diagonal.sqrt(), lambda g: g.roots())

    def inverse_root(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Preconditioner`."""
        return self._times(v, self._inverse_root, lambda g: g.inverse_roots(), out=out)

    def transposed_inverse_root(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Preconditioner`."""
        return self._times(v, self._inverse_root, lambda g: g.transposed_inverse_roots(), out=out)

    @cached_property
    def _inverse_root(self) -> Tensor:
        return self._diagonal.rsqrt()

    def _split(self, diagonal: Tensor) -> list[Tensor]:
        return list(diagonal.split([self._sizes[k] for k in self._diagonals]))

    def _diagonal_blocks(self, v: Tensor) -> list[Tensor]:
        """The blocks of ``v`` in which P is diagonal."""
        parts = v.split(self._sizes)
        return [parts[k] for k in self._diagonals]

    def _of_blocks(self, of: Callable[[Sides], Sequence[Tensor]]) -> dict[int, Tensor]:
        """A matrix on the shorter side of each block that is a matrix."""
        return {k: matrix for g in self._sides for k, matrix in zip(g.members, of(g), strict=True)}

    def _times(
        self,
        v: Tensor,
        diagonal: Tensor,
        matrices: Callable[[Sides], Sequence[Tensor]],
        out: Tensor | None = None,
    ) -> Tensor:
        """``v`` multiplied block by block, in ``out`` if it is given."""
        if not self._sides:
            return torch.mul(v, diagonal, out=out)
        result = v.clone() if out is None else out.copy_(v)
        if self._diagonals:
            torch._foreach_mul_(self._diagonal_blocks(result), self._split(diagonal))
        return self._times_matrices(result, self._of_blocks(matrices))

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
