r"""The norm in which a step's length is measured: P of the ball :math:`\|v\|_P = \varepsilon`; nothing about networks.

In the coordinates :math:`y = P^{1/2} v` the ball is Euclidean, so of P its root and its inverse root are needed, and
its inverse for the step without products. ``Diagonal`` measures each weight in a unit that is given. ``Layers`` takes
the units from the linear term: of a weight the root of the term's mean square (Adam's geometry), and of weights that
form a matrix :math:`P = (C C^\top)^{1/2} \otimes I`, where ``C`` is their linear term. The first-order step
:math:`-P^{-1} c` is then the orthogonal factor of ``C``, which moves all its singular directions alike (Muon; Jordan et
al., 2024; Shampoo without memory).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# What is added to P, relative to the mean of its diagonal.
DAMPING = 1e-2
# RMS of Adam's step in units of its learning rate where gradients are noise (momentum 0.9): orthogonal steps are made
# as long (Liu et al., "Muon is scalable for LLM training", 2025), so that layers of both kinds learn alike.
ADAM_RMS = 0.2
# The longest shorter side of a matrix whose eigenvectors are worth their time beside a pass over the anchors.
LONGEST_SIDE = 256


class Geometry(ABC):
    """A symmetric positive definite matrix P; vectors are flat, of shape ``(n,)``."""

    @abstractmethod
    def inverse(self, v: Tensor) -> Tensor:
        """:math:`P^{-1} v`, in fresh memory."""

    @abstractmethod
    def inverse_root(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """:math:`P^{-1/2} v`, in ``out`` if it is given, which may be ``v``."""

    @abstractmethod
    def root(self, v: Tensor) -> Tensor:
        """:math:`P^{1/2} v`."""


class Diagonal(Geometry):
    """``P`` diagonal.

    Args:
        weight: Its diagonal, positive, shape ``(n,)``.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    @cached_property
    def _inverse_root(self) -> Tensor:
        return self._weight.rsqrt()

    def inverse(self, v: Tensor) -> Tensor:
        """See :class:`Geometry`."""
        return v / self._weight

    def inverse_root(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Geometry`."""
        return torch.mul(self._inverse_root, v, out=out)

    def root(self, v: Tensor) -> Tensor:
        """See :class:`Geometry`."""
        return v / self._inverse_root


@dataclass(frozen=True)
class Sides:
    """P on the shorter sides of some matrices of weights; all of these are equally long.

    Attributes:
        members: Which of the blocks these k matrices are.
        values: The eigenvalues of P on each side, ``(k, side)``, in float64.
        vectors: Its eigenvectors, ``(k, side, side)``, in float64.
    """

    members: list[int]
    values: Tensor
    vectors: Tensor


class Layers(Geometry):
    """P block by block, a block for each tensor of weights, damped and scaled so that its diagonal has a mean of 1.

    Args:
        shapes: Of the tensors, in the order of the flat vectors.
        squares: P squared, before damping, of the blocks where it is diagonal, in the shape of the tensor.
        sides: P of all other blocks.
        like: A tensor of the vectors' precision and device.
        stretch: For each block a factor of its :math:`P^{1/2}`, after that; None is 1 for all.
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
        # Of all of them, one behind the other.
        self._diagonal = torch.cat(flat).sqrt_() if flat else like.new_empty(0)
        mean = self._trace(sides) / sum(self._sizes)
        # Where there is no linear term there is nothing to measure by: P is the identity.
        some = mean > 0
        unit = torch.where(some, mean * (1 + DAMPING), 1.0)
        damping = torch.where(some, torch.full_like(mean, DAMPING / (1 + DAMPING)), 1.0)
        # In float32 a unit may underflow where all of the diagonal does.
        unit_of_weights = unit.to(like).clamp_(min=torch.finfo(like.dtype).tiny)
        self._diagonal = torch.addcdiv(damping.to(like), self._diagonal, unit_of_weights)
        self._sides = [replace(g, values=g.values / unit + damping) for g in sides]
        if stretch is not None and any(factor != 1.0 for factor in stretch):
            blocks = dict(zip(self._diagonals, self._split(self._diagonal), strict=True))
            for group in self._sides:
                blocks |= zip(group.members, group.values, strict=True)
            torch._foreach_mul_(list(blocks.values()), [stretch[k] ** 2 for k in blocks])

    def _trace(self, sides: Sequence[Sides]) -> Tensor:
        """Of P before damping."""
        sums, times = [self._diagonal.sum().double()], [1.0]
        for group in sides:
            sums.extend(group.values.sum(dim=1))
            # An eigenvalue is on the diagonal as often as the other side of its matrix is long.
            times.extend(float(max(matrix_shape(self._shapes[k]))) for k in group.members)
        return torch.stack(torch._foreach_mul(sums, times)).sum()

    def inverse(self, v: Tensor) -> Tensor:
        """See :class:`Geometry`."""
        if not self._sides:
            return v / self._diagonal
        result = v.clone()
        if self._diagonals:
            torch._foreach_div_(self._of_diagonals(result), self._split(self._diagonal))
        return self._times_matrices(result, self._matrices(-1.0))

    def inverse_root(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Geometry`."""
        return self._times(v, *self._inverse_roots, out=out)

    def root(self, v: Tensor) -> Tensor:
        """See :class:`Geometry`."""
        return self._times(v, self._diagonal.sqrt(), self._matrices(0.5))

    @cached_property
    def _inverse_roots(self) -> tuple[Tensor, dict[int, Tensor]]:
        return self._diagonal.rsqrt(), self._matrices(-0.5)

    def _matrices(self, power: float) -> dict[int, Tensor]:
        """P of the blocks that are matrices, on their shorter sides, to a power."""
        found: dict[int, Tensor] = {}
        for group in self._sides:
            raised = group.vectors * group.values.pow(power)[:, None]
            found |= zip(group.members, (raised @ group.vectors.mT).to(self._like), strict=True)
        return found

    def _split(self, diagonal: Tensor) -> list[Tensor]:
        return list(diagonal.split([self._sizes[k] for k in self._diagonals]))

    def _of_diagonals(self, v: Tensor) -> list[Tensor]:
        """The blocks of ``v`` where P is diagonal."""
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
            torch._foreach_mul_(self._of_diagonals(result), self._split(diagonal))
        return self._times_matrices(result, matrices)

    def _times_matrices(self, v: Tensor, matrices: Mapping[int, Tensor]) -> Tensor:
        """The blocks of ``v`` that are matrices multiplied in place."""
        parts = v.split(self._sizes)
        blocks = {k: parts[k].view(matrix_shape(self._shapes[k])) for k in matrices}
        products = [
            matrices[k] @ block if on_rows(self._shapes[k]) else block @ matrices[k]
            for k, block in blocks.items()
        ]
        torch._foreach_copy_(list(blocks.values()), products)
        return v


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a tensor of weights seen as a matrix: outputs, and all the rest."""
    return shape[0], math.prod(shape[1:])


def on_rows(shape: torch.Size) -> bool:
    """Whether P of a matrix acts on its rows, as the shorter side, or on its columns."""
    rows, columns = matrix_shape(shape)
    return rows <= columns


def is_matrix(weights: Tensor) -> bool:
    """Whether a tensor of weights is orthogonalised: a matrix, and not too large a one."""
    return weights.dim() >= 2 and 1 < min(matrix_shape(weights.shape)) <= LONGEST_SIDE


def orthogonalizing(linears: Mapping[int, Tensor]) -> list[Sides]:
    r"""P of matrices of weights, :math:`(C C^\top / \text{columns})^{1/2}` on the shorter side of each.

    Its diagonal is in the units of ``c``, as is that of Adam's geometry, the root of the mean of :math:`c^2`.

    Args:
        linears: The linear term ``C`` of each block that is a matrix.
    """
    # Sides of one length are decomposed, and multiplied, at once.
    of_one_length: dict[int, list[int]] = {}
    for k, linear in linears.items():
        of_one_length.setdefault(min(matrix_shape(linear.shape)), []).append(k)
    return [_sides_of(members, [linears[k] for k in members]) for members in of_one_length.values()]


def _sides_of(members: list[int], linears: list[Tensor]) -> Sides:
    stacked = torch.stack([_gram(linear, 1.0) for linear in linears])
    # By LAPACK: cuSOLVER takes longer for a few matrices of this size, and much longer on a shared GPU.
    grams = stacked.cpu()
    # An entry of C beyond 1e150, or one below its inverse, has no square in float64.
    squares = grams.diagonal(dim1=1, dim2=2).sum(dim=1)
    scales = [1.0] * len(linears)
    for k in torch.nonzero(~((squares > 1e-250) & (squares < torch.inf))).flatten().tolist():
        largest = float(linears[k].abs().max()) if linears[k].numel() else 0.0
        if largest > 0:
            scales[k] = largest
            grams[k] = _gram(linears[k], largest).cpu()
    values, vectors = (t.to(stacked.device) for t in torch.linalg.eigh(grams))
    torch._foreach_div_(
        list(values.clamp_min_(0)), [float(max(matrix_shape(c.shape))) for c in linears]
    )
    roots = values.sqrt_().div_(ADAM_RMS)
    torch._foreach_mul_(list(roots), scales)
    return Sides(members, roots, vectors)


def _gram(linear: Tensor, scale: float) -> Tensor:
    """:math:`C C^T` on the shorter side of a matrix of weights, of ``linear / scale``, in float64."""
    c = linear.reshape(matrix_shape(linear.shape)).double()
    if scale != 1.0:
        c = c / scale
    return c @ c.T if on_rows(linear.shape) else c.T @ c
