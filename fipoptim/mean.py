r"""Every mean over anchors, :math:`\frac1N \sum_i`.

The drift, the metric :math:`g` and the gradient of the drift are such means. No other file divides by the number of
anchors. Several processes share anchors: each has the rows of its own, and the numbers below are those of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from fipoptim.ranks import ALONE, Ranks


@dataclass(frozen=True)
class AnchorMean:
    """The mean over N anchors of what is known of each.

    Attributes:
        count: The number N of anchors, on all ranks together.
        ranks: The processes that share them.
    """

    count: int
    ranks: Ranks = ALONE

    def of_each(self, numbers: Tensor) -> float:
        """The mean of one number an anchor, ``(N,)``; over several ranks it is summed in float64."""
        return self.of_each_with(numbers, 0)[0]

    def of_each_with(self, numbers: Tensor, counted: int) -> tuple[float, int]:
        """:meth:`of_each`, and the sum over ranks of what each has ``counted``, told together."""
        if self.ranks.alone:
            return float(numbers.mean()), counted
        total, every = self.ranks.sums(float(numbers.double().sum()), counted)
        return total / self.count, int(every)

    def total(self, vector: Tensor) -> Tensor:
        """The sum over ranks of a vector that each has summed over its own rows, in place."""
        return self.ranks.sum_(vector)

    def share(self, some: int) -> float:
        """The share that ``some`` of the N anchors are."""
        return some / self.count

    def squared(self, outputs: Tensor) -> float:
        r""":math:`\frac1N \sum_i \|z_i\|^2` of ``outputs`` ``(N, m)``, summed in float64."""
        return self.squared_in_parts([outputs])

    def squared_in_parts(self, parts: Iterable[Tensor]) -> float:
        """The same of outputs that come in parts ``(n, m)``, of which each rank may have another number."""
        own = math.fsum(float(part.double().square().sum()) for part in parts)
        return self.ranks.sums(own)[0] / self.count

    def inner(self, a: Tensor, b: Tensor) -> float:
        r""":math:`\frac1N \sum_i a_i^\top b_i` of outputs ``(N, m)``, summed in float64."""
        return self.ranks.sums(float((a.double() * b.double()).sum()))[0] / self.count

    def rms(self, outputs: Tensor) -> float:
        r""":math:`\sqrt{\frac1N \sum_i \|z_i\|^2}` of ``outputs`` ``(N, m)``."""
        return math.sqrt(self.squared(outputs))

    def squared_gradient(self, outputs: Tensor) -> Tensor:
        r"""The derivative of :meth:`squared` by ``outputs``, :math:`\frac2N z`, shape ``(N, m)``."""
        return outputs * (2.0 / self.count)

    def weighted(self, outputs: Tensor) -> Tensor:
        r""":math:`\frac1N z`: the pullback of the weighted ``outputs`` is the mean of their pullbacks.

        ``outputs`` may be those of some of the N anchors, shape ``(n, m)``; the sum over all such parts is the mean.
        """
        return outputs / self.count
