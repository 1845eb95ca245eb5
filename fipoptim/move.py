"""The weights move by a step, as a budget allows, or not at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fipoptim.anchors.refusals import is_finite
from fipoptim.metric.metric import AnchorMetric
from fipoptim.parameters import displace
from fipoptim.promise import Promise
from fipoptim.step import Step
from fipoptim.step_info import Effect, Measurement, effect_of


@dataclass(frozen=True)
class Landing:
    """The end of a step.

    Attributes:
        fraction: The fraction of the step that was taken.
        backtracks: The number of trials that were given up.
        effect: What the step did to the outputs, measured now or when someone asks.
        flips: The share of changed predictions that the budget counts; None if it was not measured.
        length: The Euclidean distance that the weights moved.
    """

    fraction: float
    backtracks: int
    effect: Effect | Measurement
    flips: float | None
    length: float


def move(metric: AnchorMetric, step: Step, promise: Promise | None) -> Landing:
    """Move the metric's parameters by the step.

    Raises:
        RuntimeError: If the step or the outputs after it are not finite, or if the budget cannot be held. The weights
            are then as they were.
    """
    params, v = metric.params, metric.unflatten(step.solution.step)
    length = metric.space.norm(step.solution.step)
    if not math.isfinite(length):
        raise RuntimeError("step: the solution of Eq. 4 is not finite; no weight was changed.")
    if step.unmeasured is not None and promise is None:
        torch._foreach_add_(params, v)
        later = Measurement(
            metric.anchors, metric.sample, metric.outputs, metric.mean, *step.unmeasured
        )
        return Landing(1.0, 0, later, None, length)
    outputs = None if step.outputs is None else _finite(metric, step.outputs)
    if outputs is not None and promise is None:
        torch._foreach_add_(params, v)  # where that leads is known and finite
        return Landing(1.0, 0, _effect(metric, step, outputs), None, length)
    start = metric.unflatten(metric.flatten(params))
    try:
        if promise is None:
            torch._foreach_add_(params, v)
            outputs = _finite(metric, metric.outputs_now())
            return Landing(1.0, 0, _effect(metric, step, outputs), None, length)
        counted = metric.sample.inputs is metric.anchors.counted.own
        known = (outputs, metric.outputs) if counted else (None, None)
        end = promise.hold(start, v, *known)
        if counted and end.outputs is not None:
            outputs = end.outputs
        elif end.backtracks or outputs is None:
            outputs = metric.outputs_now()
        outputs = _finite(metric, outputs)
    except BaseException:
        displace(params, start)
        raise
    if end.backtracks:  # another way was taken than the step
        length = metric.space.norm(metric.flatten(torch._foreach_sub(params, start)))
    effect = _effect(metric, step, outputs)._replace(drift=end.found.drift)
    return Landing(end.fraction, end.backtracks, effect, end.found.flips, length)


def _effect(metric: AnchorMetric, step: Step, outputs: Tensor) -> Effect:
    """What the step did, given the outputs ``(N, m)`` of its anchors after it."""
    before, reference = metric.outputs, metric.sample.reference
    return effect_of(step.solution.multiplier, before, outputs, reference, metric.mean)


def _finite(metric: AnchorMetric, outputs: Tensor) -> Tensor:
    """The outputs after a step.

    Raises:
        RuntimeError: If they are not finite, on this rank or another.
    """
    if not metric.anchors.ranks.every(is_finite(outputs)):
        raise RuntimeError(
            "model: its outputs on the anchors are not finite after the step; "
            "the weights are as they were. Lower eps."
        )
    return outputs
