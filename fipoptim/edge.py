"""A step at the edge of a budget: as much of it as the budget allows, found by a few forward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.measured import Measured
from fipoptim.anchors.refusals import is_finite
from fipoptim.budget import Budget
from fipoptim.parameters import displace

# The fractions of a step that are considered, alone and with the function restored beside the step. To consider one
# costs no evaluation of the network.
FRACTIONS = tuple(0.7**k for k in range(1, 20))
RESTORED_FRACTIONS = (1.0, *FRACTIONS, 0.0)
# The share of the bound on the drift that a prediction aims at.
AIM = 0.95
# The least fraction that is taken alone: a smaller one is worth an evaluation of the restoring direction.
LEAST_ALONE = 0.15
# The most of the restoring direction.
MOST_RESTORING = 4.0


@dataclass(frozen=True)
class WithinBudget:
    """The end of a step that was held within the budget.

    Attributes:
        fraction: The fraction of the step that was taken.
        backtracks: The number of trials that were given up.
        found: The distance from the reference there.
        outputs: The outputs of all inputs on which the budget counts, shape ``(N, m)``; None if they are not kept.
    """

    fraction: float
    backtracks: int
    found: Measured
    outputs: Tensor | None


class Edge:
    """Moves parameters by as much of a step as a budget allows.

    The start of a step is within the budget, so a fraction of zero always is. Between the start and the step, outputs
    are taken to be linear: two evaluations predict all fractions, and one confirms the largest that is within. If none
    is, the step is combined with the direction that restores the function, whose effect takes one evaluation more.
    That follows the surface of the budget.

    Args:
        budget: The budget.
        anchors: The anchors; the budget counts on their ``counted`` inputs.
        params: The parameters, which are moved in place.
        restoring: Gives the direction that restores the function, one tensor a parameter; None if there is none.
    """

    def __init__(
        self,
        budget: Budget,
        anchors: AnchorBatch,
        params: list[Tensor],
        restoring: Callable[[], list[Tensor] | None],
    ) -> None:
        self._budget, self._counted, self.params = budget, anchors.counted, params
        self._restoring = restoring

    def hold(
        self,
        start: list[Tensor],
        step: list[Tensor],
        outputs: Tensor | None,
        before: Tensor | None,
    ) -> WithinBudget | None:
        """Move the parameters from ``start`` by as much of ``step`` as the budget allows.

        Args:
            start: The parameters' values before the step.
            step: The whole step, one tensor a parameter.
            outputs: The outputs of the counted inputs after the whole step, ``(N, m)``, if they are known.
            before: Their outputs at the start, if they are known.

        Returns:
            Where the step ended, or None if the start itself is not within the budget. The parameters are then at the
            start.
        """
        displace(self.params, start, step)
        whole = self._outputs() if outputs is None else outputs
        found = self._counted.measure(whole)
        if self._budget.holds(found):
            return WithinBudget(1.0, 0, found, whole)
        displace(self.params, start)
        before = self._outputs() if before is None else before
        if not self._budget.holds(self._counted.measure(before)):
            return None
        tried = 1
        if self._counted.ranks.every(is_finite(whole)):
            change = whole - before
            alone = self._predicted_fraction(before, change)
            direction = self._restoring() if alone < LEAST_ALONE else None
            if direction is None and alone > 0:
                displace(self.params, start, step, alone)
                end = self._confirmed(alone, tried)
                if end is not None:
                    return end
                tried += 1
                direction = self._restoring()
            if direction is not None:
                end = self._beside(direction, start, step, before, change, tried)
                if end is not None:
                    return end
                tried += 1
        displace(self.params, start)
        return self._confirmed(0.0, tried)

    def _predicted_fraction(self, before: Tensor, change: Tensor) -> float:
        """The largest fraction that is predicted to be within; 0 if none is."""
        aim = self._budget.tightened(AIM)
        for fraction in FRACTIONS:
            if aim.holds(self._counted.measure(before + fraction * change)):
                return fraction
        return 0.0

    def _beside(
        self,
        direction: list[Tensor],
        start: list[Tensor],
        step: list[Tensor],
        before: Tensor,
        change: Tensor,
        tried: int,
    ) -> WithinBudget | None:
        """The largest fraction of the step that is within if the function is restored beside it; None if none is."""
        displace(self.params, start, direction)
        back = self._outputs() - before
        mean = self._counted.mean
        size = mean.squared(back)
        if not 0 < size < float("inf"):
            return None
        aim, tries = self._budget.tightened(AIM), 0
        for fraction in RESTORED_FRACTIONS:
            # If the largest fraction that is predicted to be within is not, room is made by restoring alone.
            if tries > 0 and fraction > 0:
                continue
            ahead = before + fraction * change
            residual = ahead - self._counted.own_reference.to(ahead.device)
            # The least drift along the restoring direction.
            amount = min(max(-mean.inner(residual, back) / size, 0.0), MOST_RESTORING)
            if fraction + amount > 0 and aim.holds(self._counted.measure(ahead + amount * back)):
                displace(self.params, start, step, fraction)
                torch._foreach_add_(self.params, direction, alpha=amount)
                end = self._confirmed(fraction, tried + tries)
                if end is not None:
                    return end
                tries += 1
        return None

    def _confirmed(self, fraction: float, tried: int) -> WithinBudget | None:
        """The end at the parameters of now, if it is within the budget."""
        outputs = self._outputs()
        found = self._counted.measure(outputs)
        return WithinBudget(fraction, tried, found, outputs) if self._budget.holds(found) else None

    def _outputs(self) -> Tensor:
        return self._counted.outputs(self._counted.own)
