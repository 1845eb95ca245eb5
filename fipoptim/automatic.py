r"""The weight :math:`\beta` of the secondary objective that a run chooses for itself.

The step minimises :math:`v^\top g v + c^\top v`, so along :math:`-b` the pull of the objective, :math:`\beta \|b\|`, is
balanced by that of the anchors, :math:`2 \rho \lambda_b`, at the distance :math:`\rho` at which the outputs have
changed by :math:`\rho^2 \lambda_b`. Here :math:`\lambda_b = b^\top g b / \|b\|^2`. With the weight
:math:`2 \sqrt{S \lambda_b} / \|b\|` the first gradient is balanced where the change is as large as the spread
:math:`S` of the reference outputs, the change that would forget everything. The run takes four times that, as the
gradient falls while the objective is learnt, and less if the budget leaves room for a drift :math:`D` that is small
against the spread:

.. math:: \beta = 4 \cdot \frac{2 \sqrt{S \lambda_b}}{\|b\|} \cdot \min\left(1, \frac{D}{S / 50}\right)^{3/2}.

The weight does not change if outputs, losses or weights are measured on another scale, and the length of a step does
not enter. Both constants and the power were chosen on training images of MNIST and Fashion-MNIST that were held out:
within a drift of 2.5 and of 5 most is learnt with a weight of 40 and of 100 to 300, and beyond 10 more weight does not
learn more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.mean import AnchorMean
from fipoptim.metric.metric import AnchorMetric

FACTOR = 4.0
# A budget is small if it leaves room for less than this share of the spread.
SMALL = 1 / 50


def automatic_beta(metric: AnchorMetric, gradients: list[Tensor], room: float) -> float | None:
    """The weight for a first gradient; None if that says nothing, as it is zero or does not change the outputs.

    Args:
        metric: The metric on the anchors of the step. One product is taken with it.
        gradients: The gradient ``b``, one tensor a parameter.
        room: The drift that the budget leaves room for.
    """
    b = metric.flatten(gradients)
    size = metric.space.norm(b)
    if not 0 < size < math.inf:
        return None
    change = metric.mean.rms(metric.jvp(b.div_(size)))
    most = spread(metric.anchors)
    beta = FACTOR * 2 * math.sqrt(most) * change / size
    if 0 < room < SMALL * most:
        beta *= (room / (SMALL * most)) ** 1.5
    return beta if 0 < beta < math.inf else None


def set_beta(groups: Sequence[dict[str, Any]], chosen: float | None) -> None:
    """Write the weight that was chosen to the groups that wait for one."""
    for group in groups:
        if group["beta"] == "auto" and chosen is not None:
            group["beta"] = chosen


def spread(anchors: AnchorBatch) -> float:
    """The mean squared distance of reference outputs from their mean; from zero if all are alike."""
    return spread_of(anchors.reference_parts, anchors.mean)


def spread_of(parts: Callable[[], Iterable[Tensor]], mean: AnchorMean) -> float:
    """The mean squared distance of outputs from their mean; from zero if all are alike.

    Args:
        parts: Gives the outputs ``(n, m)`` that this rank has in parts, each time that it is called.
        mean: The mean over all outputs.
    """
    total = mean.total(functools.reduce(torch.add, (part.sum(dim=0) for part in parts())))
    middle = mean.weighted(total)
    around = mean.squared_in_parts(part - middle for part in parts())
    return around if around > 0 else mean.squared_in_parts(parts())
