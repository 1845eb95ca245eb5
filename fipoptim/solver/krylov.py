"""Krylov spaces of a symmetric operator from products alone; nothing about networks or steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MatVec = Callable[[Tensor], Tensor]

_NOT_FINITE = "matvec: a metric product is not finite; the outputs' derivatives overflow."

# BLAS adds up long dot products as suits a processor: some one by one, where a million numbers of float32 come out
# wrong in the fourth digit. Here torch's own sum and norm add, in a cascade on a CPU and as a tree on a GPU, and only
# parts of a vector; the parts are added up in float64.
_ROW = 2**8  # of a norm
# Products of numbers at a time: few enough for a CPU's cache, and so many that threads or a GPU are worth starting.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**19, 2**23


def norm(v: Tensor) -> float:
    """The Euclidean norm of a flat vector; NaN or infinite if, and only if, an entry is.

    On every processor to a relative error of 1e-5 at most, and as a rule of 1e-7, in float32. (Beyond 1e308, which
    takes entries of float64, it is infinite.)
    """
    small = 1e-15 * math.sqrt(v.numel())
    if v.dtype == torch.float64:
        result = float(torch.linalg.vector_norm(v))
    else:
        whole = v.numel() // _ROW * _ROW
        rows = torch.linalg.vector_norm(v[:whole].view(-1, _ROW), dim=1)
        parts = torch.cat([rows, v[whole:]])
        result = float(torch.linalg.vector_norm(parts, dtype=torch.float64))
    if small < result < math.inf:
        return result
    # Also where squares overflow or underflow.
    largest = float(torch.linalg.vector_norm(v, math.inf)) if v.numel() else 0.0
    if not 0.0 < largest < math.inf:
        return largest
    lengths = [torch.linalg.vector_norm(a.double() / largest) for a in v.split(_AT_ONCE)]
    return largest * float(torch.linalg.vector_norm(torch.stack(lengths)))


def unit(v: Tensor) -> tuple[Tensor, float]:
    """``v`` at a length of 1, in fresh memory, and the length that it has; zero stays zero."""
    size = length = norm(v)
    if size > 0 and not 1e-30 < size < 1e30:
        # The factor itself may be outside of float32: it is taken in two parts.
        v = v * 2.0 ** (100 if size < 1 else -100)
        length = norm(v)
    return v / (length or 1.0), size


def inner(v: Tensor, w: Tensor) -> float:
    """The inner product of two flat vectors of one precision.

    On every processor its error is 1e-5 of the sum of the products' sizes at most, and as a rule 1e-8, in float32.
    """
    return float(_inner_products(v.view(1, -1), w))


def _inner_products(rows: Tensor, v: Tensor) -> Tensor:
    """The inner products of ``rows`` ``(k, n)`` with ``v`` ``(n,)``, as :func:`inner`: shape ``(k,)``, float64, CPU."""
    result = _sums_of_products(rows, v).cpu()
    if 1e-32 * v.numel() < float(result.abs().max()) < math.inf:
        return result
    # Also where products of float32 overflow or underflow.
    return _sums_of_products(rows, v, torch.float64).cpu()


def _sums_of_products(rows: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``rows @ v`` in float64, where the vectors are; the products are in ``dtype``, or in their own precision."""
    at_once = _AT_ONCE if v.device.type == "cpu" else _AT_ONCE_ELSEWHERE
    piece = max(2**12, at_once // max(2, len(rows)))
    sums = [
        (a.to(dtype or a.dtype) * b.to(dtype or b.dtype)).sum(dim=1)
        for a, b in zip(rows.split(piece, dim=1), v.split(piece), strict=True)
    ]
    return torch.stack(sums).sum(dim=0, dtype=torch.float64)


@dataclass
class _Candidate:
    """A candidate for the next basis vector.

    Attributes:
        vector: Its part outside the space.
        length: The length of that part.
        rounding: The length below which that part is rounding.
        column: The basis vector whose product it is; None for a start.
        size: The number of basis vectors that it is orthogonal to.
        start: Which start it comes from, 0 for the first.
    """

    vector: Tensor
    length: float
    rounding: float
    column: int | None
    size: int
    start: int


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
        rounding: The length below which what a product adds to the space is rounding.
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
        """Another starting vector, to be taken before the products that wait."""
        outside, length = unit(vector)
        if length > 0:
            outside, rounding = self._outside(outside), self._rounding(vector)
            self._queue.insert(
                0, _Candidate(outside, norm(outside), rounding, None, self.size, self._starts)
            )
            self._starts += 1

    def extend(self, *, newest: bool = False) -> bool:
        """Add one basis vector at the price of one product; False if there is none or no room.

        Args:
            newest: Follow the newest start for which there is something left to take, instead of all in turn.
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
        column = _inner_products(self._basis[: k + 1], product)
        outside = self._outside(product, column)
        length = norm(outside)
        if not math.isfinite(length):
            raise RuntimeError(_NOT_FINITE)
        self._T[: k + 1, k] = column
        self._T[k, : k + 1] = column
        self.rounding = max(self.rounding, float(column.abs().max()) * self._rounding(q))
        self._queue.append(
            _Candidate(outside, length, self.rounding, k, self.size, candidate.start)
        )

    def _close(self, q: Tensor, candidate: _Candidate) -> None:
        """Fill T's last column without a product: of A q_j only what the basis did not hold can meet q."""
        assert self._quadratic is not None
        k = self.size - 1
        column = torch.zeros(self.size, dtype=torch.float64, device="cpu")
        column[k] = self._quadratic(q)
        for other in self._queue:
            if other.column is not None:
                column[other.column] = inner(other.vector, q)
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
        for coordinates in (inside, None):
            if coordinates is None:
                coordinates = _sums_of_products(basis, vector)
            vector.addmv_(basis.T, coordinates.to(vector), alpha=-1)
        return vector

    @staticmethod
    def _rounding(vector: Tensor) -> float:
        return 10 * torch.finfo(vector.dtype).eps

    def coordinates(self, vector: Tensor) -> Tensor:
        r""":math:`Q^\top x`, shape ``(size,)``, float64 on the CPU."""
        if self._basis is None:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        return _inner_products(self._basis[: self.size], vector)

    def combine(self, h: Tensor) -> Tensor:
        """:math:`Q h`, shape ``(n,)``."""
        assert self._basis is not None
        return h.to(self._basis) @ self._basis[: self.size]

    def residual(self, h: Tensor) -> float:
        r""":math:`\|(I - QQ^\top) A Q h\|`, without a product."""
        found = [self._up_to_date(c) for c in self._queue if c.column is not None]
        if len(found) == 1:
            return abs(float(h[found[0].column])) * found[0].length
        total: Tensor | None = None
        for c in found:
            part = c.vector * float(h[c.column])
            total = part if total is None else total.add_(part)
        return 0.0 if total is None else norm(total)
