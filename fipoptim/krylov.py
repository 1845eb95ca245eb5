"""Krylov spaces of a symmetric operator from products alone; nothing about networks or steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MatVec = Callable[[Tensor], Tensor]


class KrylovSpace:
    r"""Orthonormal basis :math:`Q` of a block Krylov space of :math:`A` and :math:`T = Q^\top A Q`.

    Lanczos with full re-orthogonalisation. Several starting vectors are taken in turn, one product at a time
    (Ruhe's variant of block Lanczos), and starting vectors may be added later. A candidate that lies in the
    space already is dropped (deflation), so breakdown is not an error: the space is then invariant under A.

    Args:
        matvec: The product :math:`v \mapsto A v` with a symmetric :math:`A`; vectors have shape ``(n,)``.
        capacity: The largest number of basis vectors, which is also the number of products.

    Attributes:
        size: Number of basis vectors so far, each of which took one product.
    """

    def __init__(self, matvec: MatVec, capacity: int) -> None:
        self._matvec = matvec
        self._capacity = capacity
        self._basis: Tensor | None = None
        self._T = torch.zeros(0, 0, dtype=torch.float64)
        # Candidates for the next basis vector: the column whose product it is (None for a start), the
        # part of it outside the space, and the length below which that part is rounding.
        self._queue: list[tuple[int | None, Tensor, float]] = []
        self.size = 0

    @property
    def T(self) -> Tensor:
        """:math:`Q^T A Q`, shape ``(size, size)``, float64 on the CPU."""
        return self._T[: self.size, : self.size]

    @property
    def exhausted(self) -> bool:
        """Whether no candidate is left: the space is invariant under A and contains all starts."""
        return not self._queue

    def add_start(self, vector: Tensor) -> None:
        """Another starting vector, to be taken before the products that wait."""
        length = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
        if length > 0:
            scaled = vector / length
            self._queue.insert(0, (None, self._outside(scaled), self._rounding(vector)))

    def extend(self) -> bool:
        """Add one basis vector at the price of one product; False if there is none or no room."""
        while self._queue and self.size < self._capacity:
            _, vector, rounding = self._queue.pop(0)
            vector = self._outside(vector)
            length = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
            if not length > rounding:
                continue
            self._append(vector / length)
            return True
        return False

    def _append(self, q: Tensor) -> None:
        k = self.size
        if k == len(self._T):
            self._grow(q)
        assert self._basis is not None
        self._basis[k] = q
        self.size = k + 1
        product = self._matvec(q)
        if not bool(torch.isfinite(product).all()):
            raise RuntimeError(
                "matvec: a metric product is not finite; the outputs' derivatives overflow."
            )
        column = (self._basis[: k + 1] @ product).double().cpu()
        self._T[: k + 1, k] = column
        self._T[k, : k + 1] = column
        scale = max(float(column.abs().max()), float(self.T.abs().max()))
        self._queue.append((k, self._outside(product), scale * self._rounding(q)))

    def _grow(self, q: Tensor) -> None:
        """Make room for more basis vectors; doubling keeps the copies to about one of each vector."""
        room = min(self._capacity, max(16, 2 * self.size))
        basis, projected = q.new_empty(room, q.numel()), self._T.new_zeros(room, room)
        if self._basis is not None:
            basis[: self.size] = self._basis
            projected[: self.size, : self.size] = self._T
        self._basis, self._T = basis, projected

    def _outside(self, vector: Tensor) -> Tensor:
        """The part of ``vector`` orthogonal to the basis; Gram-Schmidt twice is enough."""
        if self._basis is None or self.size == 0:
            return vector
        basis = self._basis[: self.size]
        for _ in range(2):
            vector = vector - (basis @ vector) @ basis
        return vector

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
        parts = [float(h[k]) * vector for k, vector, _ in self._queue if k is not None]
        if not parts:
            return 0.0
        # One candidate is up to date; of several, the earlier ones have since been overtaken by the basis.
        outside = parts[0] if len(parts) == 1 else self._outside(sum(parts[1:], parts[0]))
        return float(torch.linalg.vector_norm(outside, dtype=torch.float64))
