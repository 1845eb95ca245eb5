"""The weights move by a step, by as much of it as the budget allows, or not at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fipoptim.anchors.output_space import squared_distance
from fipoptim.budget import DriftBudget
from fipoptim.metric.metric import AnchorMetric
from fipoptim.parameters import displace
from fipoptim.solver.vectors import norm
from fipoptim.step import Step


@dataclass(frozen=True)
class Landing:
    """The end of a step.

    Attributes:
        fraction: The fraction of the step that was taken.
        backtracks: The number of trials that were given up.
        drift: The drift after the step: on all anchors if there is a budget, else on the step's anchors.
        outputs: The outputs of the step's anchors after the step, shape ``(N, m)``.
        length: The Euclidean distance that the weights moved.
    """

    fraction: float
    backtracks: int
    drift: float
    outputs: Tensor
    length: float


def move(metric: AnchorMetric, step: Step, budget: DriftBudget | None) -> Landing:
    """Move the metric's parameters by the step.

    Raises:
        RuntimeError: If the step or the outputs after it are not finite, or if the budget cannot be held. The weights
            are then as they were.
    """
    params, v = metric.params, metric.unflatten(step.solution.step)
    length = norm(step.solution.step)
    if not math.isfinite(length):
        raise RuntimeError("step: the solution of Eq. 4 is not finite; no weight was changed.")
    outputs = None if step.outputs is None else _finite(step.outputs)
    if outputs is not None and budget is None:
        torch._foreach_add_(params, v)  # where that leads is known and finite
        return Landing(1.0, 0, _drift(metric, outputs), outputs, length)
    start = metric.unflatten(metric.flatten(params))
    try:
        if budget is None:
            torch._foreach_add_(params, v)
            outputs = _finite(metric.outputs_now())
            return Landing(1.0, 0, _drift(metric, outputs), outputs, length)
        every_anchor = metric.sample.inputs is metric.anchors.inputs
        end = budget.hold(start, v, outputs if every_anchor else None)
        if every_anchor:
            outputs = end.outputs
        elif end.backtracks or outputs is None:
            outputs = metric.outputs_now()
        outputs = _finite(outputs)
    except BaseException:
        displace(params, start)
        raise
    if end.backtracks:  # the function was restored behind the step
        length = norm(metric.flatten(torch._foreach_sub(params, start)))
    return Landing(end.fraction, end.backtracks, end.drift, outputs, length)


def _drift(metric: AnchorMetric, outputs: Tensor) -> float:
    return float(metric.mean.of(squared_distance(outputs, metric.sample.reference)))


def _finite(outputs: Tensor) -> Tensor:
    """The outputs after a step.

    Raises:
        RuntimeError: If they are not finite.
    """
    if not bool(torch.isfinite(outputs).all()):
        raise RuntimeError(
            "model: its outputs on the anchors are not finite after the step; "
            "the weights are as they were. Lower eps."
        )
    return outputs
