r"""Every mean over anchors, :math:`\frac1N \sum_i`.

The drift, the metric :math:`g` and the gradient of the drift are such means. No other file divides by the number of
anchors, so a sum over several processes has one place to go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AnchorMean:
    """The mean over N anchors of what is known of each.

    Attributes:
        count: The number N of anchors.
    """

    count: int

    def of(self, values: Tensor) -> Tensor:
        """The mean over dimension 0 of ``values``, shape ``(N, ...)``, in their own precision."""
        return values.mean(dim=0)

    def share(self, some: int) -> float:
        """The share that ``some`` of the N anchors are."""
        return some / self.count

    def squared(self, outputs: Tensor) -> float:
        r""":math:`\frac1N \sum_i \|z_i\|^2` of ``outputs`` ``(N, m)``, summed in float64."""
        return float(outputs.double().square().sum()) / self.count

    def inner(self, a: Tensor, b: Tensor) -> float:
        r""":math:`\frac1N \sum_i a_i^\top b_i` of outputs ``(N, m)``, summed in float64."""
        return float((a.double() * b.double()).sum()) / self.count

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
