r"""The norm in which a step's length is measured: P of the ball :math:`\|v\|_P = \varepsilon`; nothing about networks.

In the coordinates :math:`y = P^{1/2} v` the ball is Euclidean, so of P its root and its inverse root are what is
needed. ``Diagonal`` measures each weight in a unit of its own. ``Layers`` measures weights that form a matrix as a
matrix: with :math:`P = (C C^\top)^{1/2} \otimes I` for a layer whose linear term is ``C``, the first-order step
:math:`-P^{-1} c` is the orthogonal factor of ``C``, which moves all its singular directions alike (Muon; Jordan et al.,
2024; Shampoo without memory).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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

    @property
    def on_rows(self) -> bool:
        """Whether a matrix is multiplied from the left."""
        rows, columns = matrix_shape(self.shape)
        return rows <= columns


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
        diagonal = [
            layer.values.mean(dtype=torch.float64) * size
            for layer, size in zip(layers, self._sizes, strict=True)
        ]
        mean = torch.stack(diagonal).sum() / sum(self._sizes)
        # Where there is no linear term there is nothing to measure by: P is the identity.
        self._unit = torch.where(mean > 0, mean, 1.0)
        self._damping = torch.where(mean > 0, DAMPING, 1.0)
        self._whole = torch.where(mean > 0, 1.0 + DAMPING, 1.0)
        self._inverse_roots = self._power(-1)

    def inverse_root(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Geometry`."""
        return self._times(self._inverse_roots, v, torch.empty_like(v) if out is None else out)

    def root(self, v: Tensor) -> Tensor:
        """See :class:`Geometry`."""
        return self._times(self._power(1), v, torch.empty_like(v))

    def _power(self, sign: int) -> list[Tensor]:
        r""":math:`P^{\pm 1/2}`, block by block."""
        found = []
        for layer, factor in zip(self._layers, self._stretch, strict=True):
            damped = layer.values.div(self._unit).add_(self._damping).div_(self._whole)
            values = damped.sqrt_().mul_(factor) if sign > 0 else damped.rsqrt_().div_(factor)
            q = layer.vectors
            found.append((values if q is None else (q * values) @ q.T).to(self._like))
        return found

    def _times(self, factors: list[Tensor], v: Tensor, out: Tensor) -> Tensor:
        parts = zip(
            self._layers, factors, v.split(self._sizes), out.split(self._sizes), strict=True
        )
        for layer, factor, part, result in parts:
            if layer.vectors is None:
                torch.mul(factor.view(-1), part, out=result)
                continue
            matrix = part.view(matrix_shape(layer.shape))
            product = factor @ matrix if layer.on_rows else matrix @ factor
            result.copy_(product.view(-1))
        return out


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a tensor of weights seen as a matrix: outputs, and all the rest."""
    return shape[0], shape.numel() // shape[0]


def is_matrix(weights: Tensor) -> bool:
    """Whether a tensor of weights is orthogonalised: a matrix, and not too large a one."""
    return weights.dim() >= 2 and 1 < min(matrix_shape(weights.shape)) <= LONGEST_SIDE


def orthogonalizing(linear: Tensor) -> Layer:
    r"""P of a matrix of weights, :math:`(C C^\top / \text{columns})^{1/2}` on its shorter side.

    Its diagonal is in the units of ``c``, as is that of Adam's geometry, the root of the mean of :math:`c^2`.
    """
    rows, columns = matrix_shape(linear.shape)
    c = linear.reshape(rows, columns).double()
    gram = c @ c.T / columns if rows <= columns else c.T @ c / rows
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0).sqrt() / ADAM_RMS
    return Layer(linear.shape, values, vectors)
