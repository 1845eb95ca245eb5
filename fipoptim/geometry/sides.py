"""P on the shorter sides of matrices of weights: from eigenvectors, or from Newton-Schulz iterations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fipoptim.flat import matrix_shape
from fipoptim.geometry.newton_schulz import inverse_root_of_gram


class Sides(ABC):
    """P on the shorter sides of k matrices of weights; the sides are equally long.

    A product is a matrix ``(side, side)`` for each member. It multiplies the weights from the left if P acts on their
    rows (:func:`on_rows`), and from the right if it acts on their columns.

    Attributes:
        members: The numbers of the blocks that these matrices are.
    """

    members: list[int]

    @abstractmethod
    def traces(self) -> Tensor:
        """The trace of P on each side, shape ``(k,)``, in float64."""

    @abstractmethod
    def damped(self, unit: Tensor, damping: Tensor, factors: Sequence[float]) -> Sides:
        """``P / unit + damping``, multiplied by a factor for each matrix; it is positive definite."""

    @abstractmethod
    def inverses(self) -> Sequence[Tensor]:
        r""":math:`P^{-1}`, once damped."""

    @abstractmethod
    def roots(self) -> Sequence[Tensor]:
        r"""A root R of :math:`P = R^\top R`, once damped."""

    @abstractmethod
    def inverse_roots(self) -> Sequence[Tensor]:
        """The inverse of that root."""

    def transposed_inverse_roots(self) -> Sequence[Tensor]:
        """The transpose of that inverse."""
        return [root.mT for root in self.inverse_roots()]


class EigenSides(Sides):
    """P by its eigenvectors; its roots are symmetric.

    Args:
        members: The numbers of the blocks that these matrices are.
        values: The eigenvalues of P on each side, ``(k, side)``, in float64.
        vectors: The eigenvectors, ``(k, side, side)``, in float64.
        like: A tensor of the precision and device that products with P have.
    """

    def __init__(self, members: list[int], values: Tensor, vectors: Tensor, like: Tensor) -> None:
        self.members, self.values, self.vectors = members, values, vectors
        self._like = like.new_empty(())

    def traces(self) -> Tensor:
        """See :class:`Sides`."""
        return self.values.sum(dim=1)

    def damped(self, unit: Tensor, damping: Tensor, factors: Sequence[float]) -> EigenSides:
        """See :class:`Sides`."""
        values = self.values / unit + damping
        if any(factor != 1.0 for factor in factors):
            torch._foreach_mul_(list(values), list(factors))
        return EigenSides(self.members, values, self.vectors, self._like)

    def inverses(self) -> Sequence[Tensor]:
        """See :class:`Sides`."""
        return self._powers(-1.0)

    def roots(self) -> Sequence[Tensor]:
        """See :class:`Sides`."""
        return self._powers(0.5)

    def inverse_roots(self) -> Sequence[Tensor]:
        """See :class:`Sides`."""
        return self._inverse_roots

    def transposed_inverse_roots(self) -> Sequence[Tensor]:
        """See :class:`Sides`."""
        return self._inverse_roots

    @cached_property
    def _inverse_roots(self) -> Sequence[Tensor]:
        return self._powers(-0.5)

    def _powers(self, power: float) -> Sequence[Tensor]:
        raised = self.vectors * self.values.pow(power)[:, None]
        return list((raised @ self.vectors.mT).to(self._like))


class NewtonSides(Sides):
    r"""P by Newton-Schulz iterations, without an eigenvector; its roots are triangular.

    With ``q`` the polynomial of the iterations and :math:`\hat C` the linear term of a matrix, scaled to a length of 1,
    :math:`P^{-1} = q(\hat C \hat C^\top)` up to a factor and the damping. ``q`` is positive, so P is positive definite,
    and :math:`P^{-1} C` is what Muon takes for the orthogonal factor of ``C``. A step with products needs a root of P,
    too. With the Cholesky factor of :math:`P^{-1} = L L^\top` it is :math:`R = L^{-1}`, taken once it is asked for.

    Args:
        members: The numbers of the blocks that these matrices are.
        rows: Whether P acts on the rows of each.
        inverses: :math:`q` on each side, shape ``(side, side)``.
        sizes: What P is in units of the inverse of ``q``, for each side, shape ``(k,)``, in float64.
        traces: The trace of P on each side, shape ``(k,)``, in float64.
    """

    def __init__(
        self,
        members: list[int],
        rows: list[bool],
        inverses: list[Tensor],
        sizes: Tensor,
        traces: Tensor,
    ) -> None:
        self.members, self._rows, self._inverses = members, rows, inverses
        self._sizes, self._traces = sizes, traces

    @classmethod
    def of(cls, members: list[int], linears: list[Tensor], rms: float) -> NewtonSides:
        r"""P of the linear terms ``C``: about :math:`(C C^\top / \text{columns})^{1/2} / \text{rms}`.

        Args:
            members: The numbers of the blocks.
            linears: The linear term of each block.
            rms: The RMS of a step in units of that of an orthogonal one.
        """
        inverses, sizes, traces = [], [], []
        for linear in linears:
            shape = matrix_shape(linear.shape)
            c = linear.reshape(shape)
            # The squares of very large or small numbers are outside the range of float32.
            largest = torch.linalg.vector_norm(c, torch.inf)
            c = c / torch.where(largest > 0, largest, 1.0)
            length = torch.linalg.vector_norm(c)
            with torch.autocast(c.device.type, enabled=False):
                gram = c @ c.T if on_rows(linear.shape) else c.T @ c
                gram /= torch.where(length > 0, length, 1.0).square_()
                inverse = inverse_root_of_gram(gram)
            sizes.append(largest.double() * length / (max(shape) ** 0.5 * rms))
            # The singular values of C are those of its orthogonal factor times C.
            traces.append(sizes[-1] * (inverse * gram).sum(dtype=torch.float64))
            inverses.append(inverse)
        rows = [on_rows(linear.shape) for linear in linears]
        return cls(members, rows, inverses, torch.stack(sizes), torch.stack(traces))

    def traces(self) -> Tensor:
        """See :class:`Sides`."""
        return self._traces

    def damped(self, unit: Tensor, damping: Tensor, factors: Sequence[float]) -> NewtonSides:
        """See :class:`Sides`."""
        damped = []
        for q, size, factor in zip(self._inverses, self._sizes / unit, factors, strict=True):
            # (size / q + damping)^-1 = q (size + damping q)^-1
            shifted = q * damping.to(q)
            shifted.diagonal().add_(size.to(q))
            # Without a check of success, for which a GPU would have to finish its work: q is positive definite.
            inverse = torch.cholesky_solve(q, torch.linalg.cholesky_ex(shifted).L)
            damped.append(inverse if factor == 1.0 else inverse.div_(factor))
        return NewtonSides(self.members, self._rows, damped, self._sizes, self._traces)

    def inverses(self) -> Sequence[Tensor]:
        """See :class:`Sides`."""
        return self._inverses

    def roots(self) -> Sequence[Tensor]:
        """See :class:`Sides`."""
        ones = torch.eye(len(self._lower[0])).to(self._lower[0])
        return self._turned(
            [torch.linalg.solve_triangular(lower, ones, upper=False) for lower in self._lower]
        )

    def inverse_roots(self) -> Sequence[Tensor]:
        """See :class:`Sides`."""
        return self._turned(self._lower)

    @cached_property
    def _lower(self) -> list[Tensor]:
        return [torch.linalg.cholesky(inverse) for inverse in self._inverses]

    def _turned(self, matrices: list[Tensor]) -> list[Tensor]:
        """Matrices that multiply columns of weights, for those weights that they multiply from the right."""
        return [m if left else m.mT for m, left in zip(matrices, self._rows, strict=True)]


def on_rows(shape: torch.Size) -> bool:
    """Whether P of a matrix acts on its rows, as the shorter side, or on its columns."""
    rows, columns = matrix_shape(shape)
    return rows <= columns
