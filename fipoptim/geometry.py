r"""The norm in which a step's length is measured: P of the ball :math:`\|v\|_P = \varepsilon`; nothing about networks.

In the coordinates :math:`y = P^{1/2} v` the ball is Euclidean, so of P its root and its inverse root are what is
needed. ``Diagonal`` measures each weight in a unit of its own. ``Layers`` measures weights that form a matrix as a
matrix: with :math:`P = (C C^\top)^{1/2} \otimes I` for a layer whose linear term is ``C``, the first-order step
:math:`-P^{-1} c` is the orthogonal factor of ``C``, which moves all its singular directions alike (Muon; Jordan et al.,
2024; Shampoo without memory).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        self._inverse_root = weight.rsqrt()

    def inverse_root(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Geometry`."""
        return torch.mul(self._inverse_root, v, out=out)

    def root(self, v: Tensor) -> Tensor:
        """See :class:`Geometry`."""
        return v / self._inverse_root


@dataclass(frozen=True)
class Layer:
    """P on one tensor of weights, before damping: diagonal, or of a matrix ``(rows, columns)`` on one of its sides.

    Attributes:
        shape: Of the tensor.
        values: The diagonal, in that shape; or eigenvalues, in float64, of its shorter side.
        vectors: The eigenvectors of the matrix's side, in float64; None for a diagonal.
    """

    shape: torch.Size
    values: Tensor
    vectors: Tensor | None = None


class Layers(Geometry):
    """P block by block, a block for each tensor of weights, damped and scaled so that its diagonal has a mean of 1.

    Args:
        layers: The blocks, in the order of the flat vectors.
        like: A tensor of the vectors' precision and device.
        stretch: For each block a factor of its :math:`P^{1/2}`, after that; None is 1 for all.
    """

    def __init__(
        self, layers: Sequence[Layer], like: Tensor, stretch: Sequence[float] | None = None
    ) -> None:
        self._layers, self._like = list(layers), like.new_empty(())
        self._stretch = list(stretch or [1.0] * len(layers))
        self._sizes = [layer.shape.numel() for layer in layers]
        self._diagonal = [k for k, layer in enumerate(layers) if layer.vectors is None]
        self._groups = _of_one_size(
            {k: layer.vectors for k, layer in enumerate(layers) if layer.vectors is not None}
        )
        # An eigenvalue is on the diagonal as often as the other side of its matrix is long.
        sums = [layer.values.sum().double() for layer in layers]
        times = [n / layer.values.numel() for n, layer in zip(self._sizes, layers, strict=True)]
        mean = torch.stack(torch._foreach_mul(sums, times)).sum() / sum(self._sizes)
        # Where there is no linear term there is nothing to measure by: P is the identity.
        some = mean > 0
        whole = torch.where(some, 1.0 + DAMPING, 1.0)
        self._unit = torch.where(some, mean, 1.0) * whole
        self._damping = torch.where(some, DAMPING, 1.0) / whole
        self._inverse_roots = self._power(-1)

    def inverse_root(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Geometry`."""
        return self._times(self._inverse_roots, v.clone() if out is None else out.copy_(v))

    def root(self, v: Tensor) -> Tensor:
        """See :class:`Geometry`."""
        return self._times(self._power(1), v.clone())

    def _power(self, sign: int) -> list[Tensor]:
        r""":math:`P^{\pm 1/2}`, block by block; a flat diagonal, or a matrix."""
        found: list[Tensor] = [self._like] * len(self._layers)
        if self._diagonal:
            diagonals = [self._layers[k].values.view(-1).to(self._like) for k in self._diagonal]
            for k, power in zip(self._diagonal, self._raised(diagonals, sign), strict=True):
                found[k] = power
        for members in self._groups:
            blocks = [self._layers[k] for k in members]
            [values] = self._raised([torch.stack([b.values for b in blocks])], sign)
            q = torch.stack([b.vectors for b in blocks if b.vectors is not None])
            powers = ((q * values[:, None]) @ q.mT).to(self._like)
            for k, power in zip(members, powers, strict=True):
                found[k] = power
        if any(factor != 1.0 for factor in self._stretch):
            torch._foreach_mul_(found, [factor**sign for factor in self._stretch])
        return found

    def _raised(self, values: list[Tensor], sign: int) -> list[Tensor]:
        """Eigenvalues, scaled and damped, to the power of a half."""
        damped = torch._foreach_div(values, self._unit.to(values[0]))
        torch._foreach_add_(damped, self._damping.to(values[0]))
        torch._foreach_sqrt_(damped) if sign > 0 else torch._foreach_rsqrt_(damped)
        return list(damped)

    def _times(self, powers: list[Tensor], v: Tensor) -> Tensor:
        """``v`` multiplied in place."""
        parts = v.split(self._sizes)
        if self._diagonal:
            torch._foreach_mul_(
                [parts[k] for k in self._diagonal], [powers[k] for k in self._diagonal]
            )
        matrices = {
            k: parts[k].view(matrix_shape(self._layers[k].shape))
            for members in self._groups
            for k in members
        }
        if matrices:
            products = [
                powers[k] @ matrix if on_rows(self._layers[k].shape) else matrix @ powers[k]
                for k, matrix in matrices.items()
            ]
            torch._foreach_copy_(list(matrices.values()), products)
        return v


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a tensor of weights seen as a matrix: outputs, and all the rest."""
    return shape[0], shape.numel() // shape[0]


def on_rows(shape: torch.Size) -> bool:
    """Whether P of a matrix acts on its rows, as the shorter side, or on its columns."""
    rows, columns = matrix_shape(shape)
    return rows <= columns


def is_matrix(weights: Tensor) -> bool:
    """Whether a tensor of weights is orthogonalised: a matrix, and not too large a one."""
    return weights.dim() >= 2 and 1 < min(matrix_shape(weights.shape)) <= LONGEST_SIDE


def orthogonalizing(linears: Sequence[Tensor]) -> list[Layer]:
    r"""P of matrices of weights, :math:`(C C^\top / \text{columns})^{1/2}` on the shorter side of each.

    Its diagonal is in the units of ``c``, as is that of Adam's geometry, the root of the mean of :math:`c^2`.
    """
    grams = {}
    for k, linear in enumerate(linears):
        rows, columns = matrix_shape(linear.shape)
        c = linear.reshape(rows, columns).double()
        grams[k] = c @ c.T / columns if on_rows(linear.shape) else c.T @ c / rows
    layers: dict[int, Layer] = {}
    for members in _of_one_size(grams):
        stacked = torch.stack([grams[k] for k in members])
        # By LAPACK: cuSOLVER takes longer for a few matrices of this size, and much longer on a shared GPU.
        values, vectors = (t.to(stacked.device) for t in torch.linalg.eigh(stacked.cpu()))
        values = values.clamp_min_(0).sqrt_().div_(ADAM_RMS)
        for k, e, q in zip(members, values, vectors, strict=True):
            layers[k] = Layer(linears[k].shape, e, q)
    return [layers[k] for k in range(len(linears))]


def _of_one_size(squares: Mapping[int, Tensor]) -> list[list[int]]:
    """The keys of square matrices, those of one size together, as they can be taken at once."""
    groups: dict[int, list[int]] = {}
    for k, square in squares.items():
        groups.setdefault(len(square), []).append(k)
    return list(groups.values())
