"""The weights move by a step, as a budget allows, or not at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fipoptim.anchors.output_space import squared_distance
from fipoptim.metric.metric import AnchorMetric
from fipoptim.parameters import displace
from fipoptim.promise import Promise
from fipoptim.solver.vectors import norm
from fipoptim.step import Step


@dataclass(frozen=True)
class Landing:
    """The end of a step.

    Attributes:
        fraction: The fraction of the step that was taken.
        backtracks: The number of trials that were given up.
        drift: The drift after the step: that which the budget counts if it was measured, else on the step's anchors.
        flips: The share of changed predictions that the budget counts; None if it was not measured.
        outputs: The outputs of the step's anchors after the step, shape ``(N, m)``.
        length: The Euclidean distance that the weights moved.
    """

    fraction: float
    backtracks: int
    drift: float
    flips: float | None
    outputs: Tensor
    length: float


def move(metric: AnchorMetric, step: Step, promise: Promise | None) -> Landing:
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
    if outputs is not None and promise is None:
        torch._foreach_add_(params, v)  # where that leads is known and finite
        return Landing(1.0, 0, _drift(metric, outputs), None, outputs, length)
    start = metric.unflatten(metric.flatten(params))
    try:
        if promise is None:
            torch._foreach_add_(params, v)
            outputs = _finite(metric.outputs_now())
            return Landing(1.0, 0, _drift(metric, outputs), None, outputs, length)
        counted = metric.sample.inputs is metric.anchors.counted.inputs
        known = (outputs, metric.outputs) if counted else (None, None)
        end = promise.hold(start, v, *known)
        if counted and end.outputs is not None:
            outputs = end.outputs
        elif end.backtracks or outputs is None:
            outputs = metric.outputs_now()
        outputs = _finite(outputs)
    except BaseException:
        displace(params, start)
        raise
    if end.backtracks:  # another way was taken than the step
        length = norm(metric.flatten(torch._foreach_sub(params, start)))
    found = end.found
    return Landing(end.fraction, end.backtracks, found.drift, found.flips, outputs, length)


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
