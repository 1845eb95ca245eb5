"""The promise of a budget about the network after a step: held at every step, or restored at checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.budget import ADVICE, Budget
from fipoptim.edge import Edge, WithinBudget
from fipoptim.metric.metric import AnchorMetric
from fipoptim.parameters import displace
from fipoptim.restoring import Restored
from fipoptim.solver.first_order import first_order_step
from fipoptim.solver.preconditioner import Preconditioner

# Why a network has to be within the budget, in a step that moves nothing and before the first one.
UNMOVED = (
    "and this step moves no weight that could restore the function (no gradient, or every lr is 0)."
)
START = "before the first step; no weight was changed. Call settle(), or restore(model, anchors, ...), first."
# A fraction of a step below which the function is rather restored behind the whole step.
LITTLE = 0.25


class Promise(Protocol):
    """What a step owes to the budget."""

    def hold(
        self,
        start: list[Tensor],
        step: list[Tensor],
        outputs: Tensor | None,
        before: Tensor | None,
    ) -> WithinBudget:
        """Move the parameters from ``start`` by ``step``, and then so that the budget holds.

        Args:
            start: The parameters' values before the step.
            step: The whole step, one tensor a parameter.
            outputs: The outputs of the counted inputs after the whole step, ``(N, m)``, if they are known.
            before: Their outputs at the start, if they are known.

        Raises:
            RuntimeError: If the budget cannot be held. The parameters are then somewhere on the way.
        """


class EveryStep:
    """The budget holds after each step: as much of a step is taken as it allows.

    A step that was worth products is worth some more: where little of it is left, the whole step is taken and the
    function restored behind it.

    Args:
        edge: Finds how much of a step is within the budget.
        settle: Brings the network at the start of a step within the budget, if something else moved it out.
        behind: Restores the function behind a whole step by products; None if the step took none.
    """

    def __init__(
        self,
        edge: Edge,
        settle: Callable[[], Restored],
        behind: Callable[[], Restored] | None,
    ) -> None:
        self._edge, self._settle, self._behind = edge, settle, behind

    def hold(
        self,
        start: list[Tensor],
        step: list[Tensor],
        outputs: Tensor | None,
        before: Tensor | None,
    ) -> WithinBudget:
        """See :class:`Promise`."""
        end = self._edge.hold(start, step, outputs, before)
        if end is None:
            restored = self._settle()
            return WithinBudget(0.0, 1 + restored.steps, restored.after, None)
        if self._behind is None or end.fraction >= LITTLE:
            return end
        here = [p.clone() for p in self._edge.params]
        displace(self._edge.params, start, step)
        restored = self._behind()
        if restored.within:
            return WithinBudget(1.0, end.backtracks + restored.steps, restored.after, None)
        displace(self._edge.params, here)
        return end


class AtCheck:
    """The whole step is taken, and the network then settled if it is not within the budget.

    Args:
        budget: The budget.
        anchors: The anchors; the budget counts on their ``counted`` inputs.
        params: The parameters, which are moved in place.
        settle: Brings the network within the budget.
    """

    def __init__(
        self,
        budget: Budget,
        anchors: AnchorBatch,
        params: list[Tensor],
        settle: Callable[[], Restored],
    ) -> None:
        self._budget, self._counted, self._params = budget, anchors.counted, params
        self._settle = settle

    def hold(
        self,
        start: list[Tensor],
        step: list[Tensor],
        outputs: Tensor | None,
        before: Tensor | None,
    ) -> WithinBudget:
        """See :class:`Promise`."""
        displace(self._params, start, step)
        found = self._counted.measure(outputs)
        if self._budget.holds(found):
            return WithinBudget(1.0, 0, found, None)
        restored = self._settle()
        return WithinBudget(1.0, restored.steps, restored.after, None)


def is_due(budget: Budget, check_every: int | None, number: int) -> bool:
    """Whether the budget has to hold after step ``number``, counted from 1."""
    return budget.given and check_every is not None and number % check_every == 0


def promise_of_step(
    budget: Budget,
    check_every: int | None,
    number: int,
    metric: AnchorMetric,
    *,
    restoring: Callable[[], list[Tensor] | None],
    settle: Callable[[], Restored],
    behind: Callable[[], Restored] | None,
) -> Promise | None:
    """What step ``number``, counted from 1, owes to the budget; None if nothing.

    Args:
        budget: The budget.
        check_every: How many steps lie between checks; None never checks.
        number: The number of the step.
        metric: The metric of the step.
        restoring: Gives the direction that restores the function, one tensor a parameter.
        settle: Brings the network of now within the budget.
        behind: Restores the function behind a step that took products; None if it took none.
    """
    if not is_due(budget, check_every, number):
        return None
    if check_every != 1:
        return AtCheck(budget, metric.anchors, metric.params, settle)
    return EveryStep(Edge(budget, metric.anchors, metric.params, restoring), settle, behind)


def outputs_after(metric: AnchorMetric, budget: Budget, v: Tensor) -> Tensor:
    """The outputs of a step's anchors after a step ``v`` ``(n,)``; with a budget, by the evaluation of drift()."""
    anchors = metric.anchors
    if not budget.given or metric.sample.inputs is not anchors.counted.own:
        return metric.outputs_after(v)
    return anchors.outputs(anchors.own, metric.weights_after(v))


def down_drift(
    metric: AnchorMetric,
    gradient: Tensor | None,
    length: float,
    preconditioner: Preconditioner | None,
) -> list[Tensor] | None:
    """The step of this length down the gradient of the drift, one tensor a parameter; None without a gradient."""
    if gradient is None:
        return None
    v, gain = first_order_step(gradient, length, preconditioner, space=metric.space)
    return metric.unflatten(v) if 0 < gain < math.inf else None


def check_within(budget: Budget, anchors: AnchorBatch, why: str) -> None:
    """Refuse a network that is not within the budget.

    Args:
        budget: The budget.
        anchors: The anchors; the budget counts on their ``counted`` inputs.
        why: The end of the message, after what is not within.

    Raises:
        RuntimeError: If a bound does not hold.
    """
    found = anchors.counted.measure()
    if not budget.holds(found):
        raise RuntimeError(f"{budget.broken(found)}, {why} {ADVICE}")
