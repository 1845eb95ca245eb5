r"""The weight :math:`\beta` of the secondary objective that a run chooses for itself.

The step minimises :math:`v^\top g v + c^\top v`, so along :math:`-b` the pull of the objective, :math:`\beta \|b\|`, is
balanced by that of the anchors, :math:`2 \rho \lambda_b`, at the distance :math:`\rho` at which the outputs have
changed by :math:`\rho^2 \lambda_b`. Here :math:`\lambda_b = b^\top g b / \|b\|^2`. The weight puts that balance where
the change is as large as the spread :math:`S` of the reference outputs, the change that would forget everything:

.. math:: \beta = \frac{2 \sqrt{S \lambda_b}}{\|b\|}.

It is free of units: it does not change if outputs, losses or weights are measured on another scale. Neither the length
of a step nor the budget enters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fipoptim.mean import AnchorMean
from fipoptim.metric.metric import AnchorMetric
from fipoptim.solver.vectors import norm


def automatic_beta(metric: AnchorMetric, gradients: list[Tensor]) -> float | None:
    """The weight for a first gradient; None if that says nothing, as it is zero or does not change the outputs.

    Args:
        metric: The metric on the anchors of the step. One product is taken with it.
        gradients: The gradient ``b``, one tensor a parameter.
    """
    b = metric.flatten(gradients)
    size = norm(b)
    if not 0 < size < math.inf:
        return None
    change = metric.mean.rms(metric.jvp(b.div_(size)))
    beta = 2 * math.sqrt(spread(metric.anchors.reference)) * change / size
    return beta if 0 < beta < math.inf else None


def set_beta(groups: Sequence[dict[str, Any]], chosen: float | None) -> None:
    """Write the weight that was chosen to the groups that wait for one."""
    for group in groups:
        if group["beta"] == "auto" and chosen is not None:
            group["beta"] = chosen


def spread(reference: Tensor) -> float:
    """The mean squared distance of outputs ``(N, m)`` from their mean; from zero if all are alike."""
    mean = AnchorMean(len(reference))
    around = mean.squared(reference - mean.of(reference))
    return around if around > 0 else mean.squared(reference)
