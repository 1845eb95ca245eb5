"""Krylov spaces of a symmetric operator from products alone; nothing about networks or steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fipoptim.solver.space import WHOLE, Space

MatVec = Callable[[Tensor], Tensor]

_NOT_FINITE = "matvec: a metric product is not finite; the outputs' derivatives overflow."


@dataclass
class _Candidate:
    """A candidate for the next basis vector.

    Attributes:
        vector: The candidate's part outside the space, shape ``(n,)``.
        length: The length of that part.
        rounding: The length below which that part is rounding.
        column: The index of the basis vector whose product the candidate is; None for a starting vector.
        size: The number of basis vectors that the candidate is orthogonal to.
        start: The number of the starting vector that the candidate comes from; 0 is the first.
    """

    vector: Tensor
    length: float
    rounding: float
    column: int | None
    size: int
    start: int


class KrylovSpace:
    r"""Orthonormal basis :math:`Q` of a block Krylov space of :math:`A` and :math:`T = Q^\top A Q`.

    The method is Lanczos with full re-orthogonalisation. Several starting vectors take turns, one product at a time
    (Ruhe's variant of block Lanczos), and starting vectors may be added later. A candidate that already lies in the
    space is dropped (deflation). Breakdown is therefore no error: the space is then invariant under A.

    Args:
        matvec: The product :math:`v \mapsto A v` with a symmetric :math:`A`; vectors have shape ``(n,)``. Its result is
            written to.
        capacity: The largest number of basis vectors, which is also the largest number of products.
        quadratic: :math:`v \mapsto v^\top A v`, if that is cheaper than a product. It replaces the product of the last
            vector that there is room for: that product would serve only :meth:`residual`.
        space: The space of the vectors, which may be divided among ranks.

    Attributes:
        size: Number of basis vectors so far, each of which took one product.
        rounding: The length below which a product's part outside the space is rounding.
        closed: Whether the last vector took its quadratic form in place of a product, so that :meth:`residual` is not
            known.
    """

    def __init__(
        self,
        matvec: MatVec,
        capacity: int,
        quadratic: Callable[[Tensor], float] | None = None,
        *,
        space: Space = WHOLE,
    ) -> None:
        self._matvec, self._space = matvec, space
        self._quadratic = quadratic
        self._capacity = capacity
        self._basis: Tensor | None = None
        self._T = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self.rounding = 0.0
        self._queue: list[_Candidate] = []
        self._starts = 0
        self.size = 0
        self.closed = False

    @property
    def T(self) -> Tensor:
        """:math:`Q^T A Q`, shape ``(size, size)``, float64 on the CPU."""
        return self._T[: self.size, : self.size]

    @property
    def exhausted(self) -> bool:
        """Whether no candidate is left: the space is invariant under A and contains all starts."""
        return not self._queue and not self.closed

    def add_start(self, vector: Tensor) -> None:
        """Add a starting vector; it is taken before the candidates that wait."""
        outside, length = self._space.unit(vector)
        if length > 0:
            outside, rounding = self._outside(outside), self._rounding(vector)
            self._queue.insert(
                0,
                _Candidate(
                    outside, self._space.norm(outside), rounding, None, self.size, self._starts
                ),
            )
            self._starts += 1

    def extend(self, *, newest: bool = False) -> bool:
        """Add one basis vector, at the price of one product; False if there is no candidate or no room.

        Args:
            newest: Take the candidate of the newest starting vector that has one, instead of taking turns.
        """
        while self._queue and self.size < self._capacity:
            waiting = range(len(self._queue))
            chosen = max(waiting, key=lambda i: self._queue[i].start) if newest else 0
            candidate = self._up_to_date(self._queue.pop(chosen))
            if candidate.length > candidate.rounding:
                self._append(candidate)
                return True
        return False

    def _up_to_date(self, candidate: _Candidate) -> _Candidate:
        """The candidate, orthogonal to the basis vectors that were added since it was found."""
        if candidate.size < self.size:
            candidate.vector = self._outside(candidate.vector)
            candidate.length, candidate.size = self._space.norm(candidate.vector), self.size
        return candidate

    def _append(self, candidate: _Candidate) -> None:
        k = self.size
        if k == len(self._T):
            self._grow(candidate.vector)
        assert self._basis is not None
        q = torch.div(candidate.vector, candidate.length, out=self._basis[k])
        self.size = k + 1
        if self.size == self._capacity and self._quadratic is not None:
            self._close(q, candidate)
            return
        product = self._matvec(q)
        column = self._space.inner_products(self._basis[: k + 1], product)
        outside = self._outside(product, column)
        length = self._space.norm(outside)
        if not math.isfinite(length):
            raise RuntimeError(_NOT_FINITE)
        self._T[: k + 1, k] = column
        self._T[k, : k + 1] = column
        self.rounding = max(self.rounding, float(column.abs().max()) * self._rounding(q))
        self._queue.append(
            _Candidate(outside, length, self.rounding, k, self.size, candidate.start)
        )

    def _close(self, q: Tensor, candidate: _Candidate) -> None:
        """Fill T's last column without a product: only the part of A q_j outside the earlier basis meets q."""
        assert self._quadratic is not None
        k = self.size - 1
        column = torch.zeros(self.size, dtype=torch.float64, device="cpu")
        column[k] = self._quadratic(q)
        for other in self._queue:
            if other.column is not None:
                column[other.column] = self._space.inner(other.vector, q)
        if candidate.column is not None:
            column[candidate.column] = candidate.length
        if not bool(torch.isfinite(column).all()):
            raise RuntimeError(_NOT_FINITE)
        self._T[: k + 1, k] = column
        self._T[k, : k + 1] = column
        self._queue.clear()
        self.closed = True

    def _grow(self, q: Tensor) -> None:
        """Make room for more basis vectors; as the room doubles, each vector is copied about once."""
        room = min(self._capacity, max(16, 2 * self.size))
        basis, projected = q.new_empty(room, q.numel()), self._T.new_zeros(room, room)
        if self._basis is not None:
            basis[: self.size] = self._basis
            projected[: self.size, : self.size] = self._T
        self._basis, self._T = basis, projected

    def _outside(self, vector: Tensor, inside: Tensor | None = None) -> Tensor:
        """The part of ``vector`` orthogonal to the basis, computed in place by Gram-Schmidt, twice.

        Args:
            vector: The vector, shape ``(n,)``, which is written to.
            inside: The coordinates of the vector in the basis, shape ``(size,)``, if they are known.
        """
        if self._basis is None or self.size == 0:
            return vector
        basis = self._basis[: self.size]
        for coordinates in (inside, None):
            if coordinates is None:
                coordinates = self._space.sums_of_products(basis, vector)
            vector.addmv_(basis.T, coordinates.to(vector), alpha=-1)
        return vector

    @staticmethod
    def _rounding(vector: Tensor) -> float:
        return 10 * torch.finfo(vector.dtype).eps

    def coordinates(self, vector: Tensor) -> Tensor:
        r""":math:`Q^\top x`, shape ``(size,)``, float64 on the CPU."""
        if self._basis is None:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        return self._space.inner_products(self._basis[: self.size], vector)

    def combine(self, h: Tensor) -> Tensor:
        """:math:`Q h`, shape ``(n,)``."""
        assert self._basis is not None
        return h.to(self._basis) @ self._basis[: self.size]

    def lowest(self) -> tuple[float, float]:
        r"""The lowest eigenvalue :math:`\theta` of T and its error, without a product.

        Some eigenvalue of A lies within the error :math:`\|(A - \theta) Q h\|` of :math:`\theta`, where ``h`` is the
        eigenvector.
        """
        values, vectors = torch.linalg.eigh(self.T)
        return float(values[0]), self.residual(vectors[:, 0])

    def residual(self, h: Tensor) -> float:
        r""":math:`\|(I - QQ^\top) A Q h\|`, without a product."""
        found = [self._up_to_date(c) for c in self._queue if c.column is not None]
        if len(found) == 1:
            return abs(float(h[found[0].column])) * found[0].length
        total: Tensor | None = None
        for c in found:
            part = c.vector * float(h[c.column])
            total = part if total is None else total.add_(part)
        return 0.0 if total is None else self._space.norm(total)
