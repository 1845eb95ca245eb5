"""Krylov spaces of a symmetric operator from products alone; nothing about networks or steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MatVec = Callable[[Tensor], Tensor]

# Long vectors are summed in rows of this length, the rows in float64.
_ROW = 2**14
_PIECE = 2**20  # of an inner product
_NOT_FINITE = "matvec: a metric product is not finite; the outputs' derivatives overflow."


def norm(v: Tensor) -> float:
    """The Euclidean norm of a flat vector; NaN or infinite if, and only if, an entry is.

    As accurate as in float64, and as fast as in the vector's own precision.
    """
    whole = v.numel() // _ROW * _ROW
    result = math.inf
    if whole and v.dtype != torch.float64:
        rows = torch.linalg.vector_norm(v[:whole].view(-1, _ROW), dim=1)
        result = math.hypot(
            float(torch.linalg.vector_norm(rows, dtype=torch.float64)),
            float(torch.linalg.vector_norm(v[whole:], dtype=torch.float64))
            if whole < v.numel()
            else 0.0,
        )
    if 1e-15 < result < math.inf:
        return result
    # Also where the squares of float32 overflow or underflow.
    return float(torch.linalg.vector_norm(v, dtype=torch.float64))


def inner(v: Tensor, w: Tensor) -> float:
    """The inner product of two flat vectors of one precision, in pieces so that long ones lose little of it."""
    pieces = [a @ b for a, b in zip(v.split(_PIECE), w.split(_PIECE), strict=True)]
    result = float(torch.stack(pieces).sum(dtype=torch.float64))
    if 1e-30 < abs(result) < math.inf:
        return result
    # Also where the products of float32 overflow or underflow.
    return float(v.double() @ w.double())


@dataclass
class _Candidate:
    """A candidate for the next basis vector.

    Attributes:
        vector: Its part outside the space.
        length: The length of that part.
        rounding: The length below which that part is rounding.
        column: The basis vector whose product it is; None for a start.
        size: The number of basis vectors that it is orthogonal to.
    """

    vector: Tensor
    length: float
    rounding: float
    column: int | None
    size: int


class KrylovSpace:
    r"""Orthonormal basis :math:`Q` of a block Krylov space of :math:`A` and :math:`T = Q^\top A Q`.

    Lanczos with full re-orthogonalisation. Several starting vectors are taken in turn, one product at a time
    (Ruhe's variant of block Lanczos), and starting vectors may be added later. A candidate that lies in the
    space already is dropped (deflation), so breakdown is not an error: the space is then invariant under A.

    Args:
        matvec: The product :math:`v \mapsto A v` with a symmetric :math:`A`; vectors have shape ``(n,)``. What it
            returns is written to.
        capacity: The largest number of basis vectors, which is also the number of products.
        quadratic: :math:`v \mapsto v^\top A v`, if that is cheaper than a product. It is taken for the last vector
            that there is room for, whose product would serve only :meth:`residual`.

    Attributes:
        size: Number of basis vectors so far, each of which took one product.
        closed: Whether the last vector took its quadratic form only, so that :meth:`residual` is not known.
    """

    def __init__(
        self,
        matvec: MatVec,
        capacity: int,
        quadratic: Callable[[Tensor], float] | None = None,
    ) -> None:
        self._matvec = matvec
        self._quadratic = quadratic
        self._capacity = capacity
        self._basis: Tensor | None = None
        self._T = torch.zeros(0, 0, dtype=torch.float64)
        self._queue: list[_Candidate] = []
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
        """Another starting vector, to be taken before the products that wait."""
        length = norm(vector)
        if length > 0:
            outside = self._outside(vector / length)
            self._queue.insert(
                0, _Candidate(outside, norm(outside), self._rounding(vector), None, self.size)
            )

    def extend(self) -> bool:
        """Add one basis vector at the price of one product; False if there is none or no room."""
        while self._queue and self.size < self._capacity:
            candidate = self._up_to_date(self._queue.pop(0))
            if candidate.length > candidate.rounding:
                self._append(candidate)
                return True
        return False

    def _up_to_date(self, candidate: _Candidate) -> _Candidate:
        """The candidate, orthogonal to the basis vectors that were added since it was found."""
        if candidate.size < self.size:
            candidate.vector = self._outside(candidate.vector)
            candidate.length, candidate.size = norm(candidate.vector), self.size
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
        inside = self._basis[: k + 1] @ product
        column = inside.double().cpu()
        outside = self._outside(product, inside)
        length = norm(outside)
        if not math.isfinite(length):
            raise RuntimeError(_NOT_FINITE)
        self._T[: k + 1, k] = column
        self._T[k, : k + 1] = column
        scale = max(float(column.abs().max()), float(self.T.abs().max()))
        self._queue.append(_Candidate(outside, length, scale * self._rounding(q), k, self.size))

    def _close(self, q: Tensor, candidate: _Candidate) -> None:
        """Fill T's last column without a product: of A q_j only what the basis did not hold can meet q."""
        assert self._quadratic is not None
        k = self.size - 1
        column = torch.zeros(self.size, dtype=torch.float64)
        column[k] = self._quadratic(q)
        for other in self._queue:
            if other.column is not None:
                column[other.column] = float(other.vector @ q)
        if candidate.column is not None:
            column[candidate.column] = candidate.length
        if not bool(torch.isfinite(column).all()):
            raise RuntimeError(_NOT_FINITE)
        self._T[: k + 1, k] = column
        self._T[k, : k + 1] = column
        self._queue.clear()
        self.closed = True

    def _grow(self, q: Tensor) -> None:
        """Make room for more basis vectors; doubling keeps the copies to about one of each vector."""
        room = min(self._capacity, max(16, 2 * self.size))
        basis, projected = q.new_empty(room, q.numel()), self._T.new_zeros(room, room)
        if self._basis is not None:
            basis[: self.size] = self._basis
            projected[: self.size, : self.size] = self._T
        self._basis, self._T = basis, projected

    def _outside(self, vector: Tensor, inside: Tensor | None = None) -> Tensor:
        """The part of ``vector`` orthogonal to the basis, in place, given its coordinates there if they are known.

        Gram-Schmidt twice is enough.
        """
        if self._basis is None or self.size == 0:
            return vector
        basis = self._basis[: self.size]
        inside = basis @ vector if inside is None else inside
        vector.addmv_(basis.T, inside, alpha=-1)
        return vector.addmv_(basis.T, basis @ vector, alpha=-1)

    @staticmethod
    def _rounding(vector: Tensor) -> float:
        return 10 * torch.finfo(vector.dtype).eps

    def coordinates(self, vector: Tensor) -> Tensor:
        r""":math:`Q^\top x`, shape ``(size,)``, float64 on the CPU."""
        if self._basis is None:
            return torch.zeros(0, dtype=torch.float64)
        return (self._basis[: self.size] @ vector).double().cpu()

    def combine(self, h: Tensor) -> Tensor:
        """:math:`Q h`, shape ``(n,)``."""
        assert self._basis is not None
        return h.to(self._basis) @ self._basis[: self.size]

    def residual(self, h: Tensor) -> float:
        r""":math:`\|(I - QQ^\top) A Q h\|`, without a product."""
        found = [c for c in self._queue if c.column is not None]
        if not found:
            return 0.0
        if len(found) == 1 and found[0].size == self.size:
            return abs(float(h[found[0].column])) * found[0].length
        # Of several candidates the earlier ones have since been overtaken by the basis.
        total = sum(float(h[c.column]) * c.vector for c in found)
        assert isinstance(total, Tensor)
        return norm(self._outside(total))
