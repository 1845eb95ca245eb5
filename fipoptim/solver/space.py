"""The space of flat vectors: each is whole, or divided among ranks that have a part each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from fipoptim.ranks import ALONE, Ranks
from fipoptim.solver import vectors


@dataclass(frozen=True)
class Part:
    """The part of a tensor that this rank has.

    Attributes:
        shape: The shape of the whole tensor.
        dim: The dimension along which it is divided.
        start: The first index of the part.
        length: The number of indices, which may be 0.
    """

    shape: torch.Size
    dim: int
    start: int
    length: int

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor, as a view."""
        return whole.narrow(self.dim, self.start, self.length) if self.shape else whole

    def rows(self, numbers: Iterable[int]) -> list[int]:
        """Those of some rows of the whole tensor, along dimension 0, that are in the part: their numbers there."""
        if self.dim != 0:
            return list(numbers)
        return [k - self.start for k in numbers if 0 <= k - self.start < self.length]


class Space:
    """Lengths and inner products of flat vectors, and random ones.

    What is asked for is the same number on every rank, so that each decides alike. With several ranks every method is
    a collective.

    Args:
        ranks: The ranks among which vectors are divided.
        parts: The parts of this rank, one after the other; none if each vector is whole.
    """

    def __init__(self, ranks: Ranks = ALONE, parts: Sequence[Part] = ()) -> None:
        self._ranks = ranks
        self._parts = list(parts)

    @property
    def whole(self) -> bool:
        """Whether this process has whole vectors."""
        return self._ranks.alone

    def size(self, v: Tensor) -> int:
        """The number n of entries of the whole vector of which ``v`` is the part of this rank."""
        return v.numel() if self.whole else sum(part.shape.numel() for part in self._parts)

    def norm(self, v: Tensor) -> float:
        """The Euclidean norm of a vector; NaN or infinite if, and only if, an entry is. See :func:`vectors.norm`."""
        return self.length(vectors.norm(v))

    def length(self, own: float) -> float:
        """The Euclidean norm of what is divided among ranks, of which ``own`` is the norm of this rank's part."""
        if self.whole:
            return own
        (square,) = self._ranks.sums(own * own)
        if 1e-280 < square < math.inf or math.isnan(square):
            return math.sqrt(square)
        # Squares may overflow or underflow; those relative to the longest part do not.
        (longest,) = self._ranks.largest(own)
        if not 0.0 < longest < math.inf:
            return longest
        return longest * math.sqrt(self._ranks.sums((own / longest) ** 2)[0])

    def unit(self, v: Tensor) -> tuple[Tensor, float]:
        """``v`` scaled to a length of 1, in fresh memory, and the length of ``v``; a zero vector stays zero."""
        size = length = self.norm(v)
        if size > 0 and not 1e-30 < size < 1e30:
            # The inverse of the length may be outside the range of float32, so the vector is scaled twice.
            v = v * 2.0 ** (100 if size < 1 else -100)
            length = self.norm(v)
        return v / (length or 1.0), size

    def inner(self, v: Tensor, w: Tensor) -> float:
        """The inner product of two vectors of one precision, as precise as :meth:`inner_products`."""
        return float(self.inner_products(v.view(1, -1), w))

    def inner_products(self, rows: Tensor, v: Tensor) -> Tensor:
        """The inner product of each of the ``rows`` ``(k, n)`` with ``v`` ``(n,)``: ``(k,)``, float64, on the CPU.

        Its error in float32 is at most 1e-5, and as a rule 1e-8, of the sum of the products' sizes.
        """
        result = self.sums_of_products(rows, v).cpu()
        if 1e-32 * self.size(v) < float(result.abs().max()) < math.inf:
            return result
        # Products in float32 may overflow or underflow; those in float64 do not.
        return self.sums_of_products(rows, v, torch.float64).cpu()

    def sums_of_products(self, rows: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As :func:`vectors.sums_of_products`."""
        return self._ranks.sum_(vectors.sums_of_products(rows, v, dtype))

    # --- numbers of which each rank knows a part ------------------------------------------------------------

    def sums(self, *numbers: float) -> list[float]:
        """The sum over ranks of each number."""
        return self._ranks.sums(*numbers)

    def largest(self, *numbers: float) -> list[float]:
        """The largest over ranks of each number."""
        return self._ranks.largest(*numbers)

    def any(self, *conditions: bool) -> list[bool]:
        """Whether each condition holds on a rank."""
        return [found > 0 for found in self._ranks.largest(*map(float, conditions))]

    # --- random vectors ---------------------------------------------------------------------------------

    def random(self, like: Tensor, generator: Generator) -> Tensor:
        """A vector of normal numbers, the same however it is divided; the whole is on no rank.

        Args:
            like: A tensor of the vector's size on this rank, precision and device.
            generator: A generator on the CPU, in the same state on every rank.
        """
        drawn = _Normal(self.size(like), generator)
        if self.whole:
            return drawn.next(like.numel()).to(like)
        parts = [
            part.of(drawn.next(part.shape.numel()).view(part.shape)).reshape(-1).to(like)
            for part in self._parts
        ]
        return torch.cat(parts)


class _Normal:
    """The numbers of ``torch.randn(n)`` in float64, of which only some are held at a time.

    torch draws normal numbers in blocks of 16, so that pieces of whole blocks follow each other as in one draw. Only
    the last block of a draw differs, and takes 16 numbers at least.

    Args:
        n: The number of all.
        generator: The generator.
    """

    _BLOCK, _PIECE = 16, 2**16

    def __init__(self, n: int, generator: Generator) -> None:
        self._left, self._generator = n, generator
        self._held = torch.empty(0, dtype=torch.float64, device="cpu")

    def next(self, count: int) -> Tensor:
        """The next ``count`` numbers; all at once are those of one draw."""
        held = [self._held]
        missing = count - len(self._held)
        while missing > 0:
            piece = min(self._left, max(self._PIECE, -(-missing // self._BLOCK) * self._BLOCK))
            if self._left - piece < self._BLOCK:
                piece = self._left
            held.append(
                torch.randn(piece, generator=self._generator, dtype=torch.float64, device="cpu")
            )
            self._left -= piece
            missing -= piece
        numbers = torch.cat(held)
        self._held = numbers[count:].clone()
        return numbers[:count]


WHOLE = Space()
