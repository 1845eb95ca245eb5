"""The promise about the network that is kept: restoring steps bring it within the budget, or it goes back."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.measured import Measured
from fipoptim.budget import ADVICE, Budget
from fipoptim.metric.chunks import Form
from fipoptim.parameters import StepParameters, displace, distance
from fipoptim.restoring import Restored, Restoring
from fipoptim.solver.space import Space
from fipoptim.state import last_within

# A budget that is reached within this share of the way back takes no restoring step.
NEAR = 0.05
# The shares of the way back that are tried before a restoring step. They cost a forward pass each and little of what
# was learnt: the function drifts on the way by noise as well, and that is what goes first.
SHARES = (0.025, 0.05)
# After a round that leaves more than LITTLE_GAIN of the drift, the next one goes back by FARTHER, even if the drift
# rises on the way: the restoring step behind it then lowers the drift further.
LITTLE_GAIN, FARTHER = 0.95, 0.1
# The share of the way back that is needed is found by this many halvings: to a hundredth.
HALVINGS = 7
# The most products of all restoring steps of one settlement.
MAX_PRODUCTS = 96


@torch.no_grad()
def settle(
    anchors: AnchorBatch,
    parameters: StepParameters,
    budget: Budget,
    state: Mapping[Tensor, Any],
    *,
    form: Callable[[], Form],
    max_products: int = MAX_PRODUCTS,
) -> Restored:
    """Bring the anchors' model within the budget.

    One network within lies on the straight line back to the last one that was. If it is not near, rounds look for a
    nearer one: each goes back a little on the line from where it is and takes a restoring step. Neither alone comes as
    far for as little of what was learnt. The line is taken if the rounds have moved the weights further than it does.

    Args:
        anchors: The anchors; the budget counts on their check inputs, if there are any.
        parameters: The parameters that may move.
        budget: The budget, with a bound at least.
        state: The optimizer's state, which knows the last network that was within.
        form: Tells how products are taken, once one is needed.
        max_products: The most products of all restoring steps; 0 takes the line.

    Raises:
        RuntimeError: If the network cannot be brought within. The weights are then as they were.
    """
    began = time.perf_counter()
    start = [p.clone() for p in parameters.tensors]
    try:
        within = last_within(state, parameters.originals)
        found = _settled(anchors, parameters, budget, start, within, form, max_products)
    except BaseException:
        displace(parameters.tensors, start)
        raise
    length = distance(parameters.tensors, start, parameters.space)
    return dataclasses.replace(found, length=length, seconds=time.perf_counter() - began)


def _settled(
    anchors: AnchorBatch,
    parameters: StepParameters,
    budget: Budget,
    start: list[Tensor],
    within: list[Tensor] | None,
    form: Callable[[], Form],
    max_products: int,
) -> Restored:
    tensors, zeros = parameters.tensors, parameters.zeros
    if within is not None and zeros is not None:
        within = [w.masked_fill(z, 0.0) for w, z in zip(within, zeros, strict=True)]
    before = anchors.counted.measure()
    found = Restored(before, before, budget.holds(before), 0.0, 0, 0, 0.0, 0.0)
    if found.within:
        return found
    line, on_line, farthest = None, None, math.inf
    if within is not None:
        line = Line(anchors, tensors, within, parameters.space)
        on_line = line.go_to_nearest(budget)
    if line is not None and on_line is not None:
        found = dataclasses.replace(
            found, after=on_line.measured, within=True, went_back=on_line.share
        )
        if on_line.share <= NEAR or max_products == 0:
            return found
        farthest = on_line.share * line.length
        line.go(0.0)
    restoring = Restoring(
        anchors,
        parameters.originals,
        budget,
        form=form,
        max_products=max_products,
        frozen=zeros,
    )
    after, went_back = rounds(anchors, tensors, budget, start, before, within, restoring, farthest)
    found = dataclasses.replace(found, steps=restoring.steps, products=restoring.products)
    if within is not None and not budget.holds(after):
        last = Line(anchors, tensors, within, parameters.space).go_to_nearest(budget)
        if last is not None:
            after, went_back = last.measured, 1.0 - (1.0 - went_back) * (1.0 - last.share)
    if budget.holds(after) and distance(tensors, start, parameters.space) < farthest:
        return dataclasses.replace(found, after=after, within=True, went_back=went_back)
    if line is None or on_line is None:
        raise RuntimeError(
            f"{budget.broken(before)}. Restoring steps came to a drift of {after.drift:.6g} with {after.flips:.4%} of "
            f"the predictions changed, and no network within the budget lies on the way back. The weights are as they "
            f"were. {ADVICE}"
        )
    line.go(on_line.share)
    return found


def rounds(
    anchors: AnchorBatch,
    params: list[Tensor],
    budget: Budget,
    start: list[Tensor],
    here: Measured,
    within: list[Tensor] | None,
    restoring: Restoring,
    farthest: float,
) -> tuple[Measured, float]:
    """Go back a little and take a restoring step, in turns, until the network is within the budget or no nearer.

    Args:
        anchors: The anchors.
        params: The parameters, which are moved in place.
        budget: The budget.
        start: The values of the parameters here.
        here: What was measured here.
        within: The last network that was within; without one, restoring steps are taken alone.
        restoring: Takes the restoring steps.
        farthest: The distance from here at which to give up.

    Returns:
        What was measured at the end, and the share of the way that it went back.
    """
    kept, gained = 1.0, True
    space = restoring.space
    while restoring.can_go_on(here) and distance(params, start, space) < farthest:
        drift = here.drift
        if within is not None:
            line = Line(anchors, params, within, space)
            point = line.go_back_a_little(budget, here, farther=not gained)
            kept, here = kept * (1.0 - point.share), point.measured
        if not budget.holds(here):
            here = restoring.step(here)
        gained = here.drift < LITTLE_GAIN * drift
        if within is None and not gained:
            break
    return here, 1.0 - kept


@dataclass(frozen=True)
class Point:
    """A network on the way back: which share of the way lies behind it, and what was measured there."""

    share: float
    measured: Measured


class Line:
    """The straight line from the network of now to the last one that was within the budget.

    Args:
        anchors: The anchors; the budget counts on their ``counted`` inputs.
        params: The parameters of now, which are moved in place.
        within: The values to which the line leads.
        space: The space of flat vectors over the parameters.

    Attributes:
        length: The Euclidean distance of both ends.
    """

    def __init__(
        self, anchors: AnchorBatch, params: list[Tensor], within: list[Tensor], space: Space
    ) -> None:
        self._counted, self._params = anchors.counted, params
        self._start = [p.clone() for p in params]
        self._within = within
        self.length = distance(params, within, space)

    def go(self, share: float) -> None:
        """Move to the network that is this share of the way back."""
        if share in (0.0, 1.0):  # bit for bit
            displace(self._params, self._start if share == 0.0 else self._within)
        else:
            between = torch._foreach_lerp(self._start, self._within, share)
            torch._foreach_copy_(self._params, list(between))

    def go_to_nearest(self, budget: Budget) -> Point | None:
        """Move to the nearest network found that is within the budget; None if the end is not."""
        end = self._at(1.0)
        return self._nearest(budget, 0.0, end, HALVINGS) if budget.holds(end.measured) else None

    def go_back_a_little(self, budget: Budget, here: Measured, *, farther: bool) -> Point:
        """Go back by the least of SHARES that is within, or else by that with the least drift.

        Args:
            budget: The budget.
            here: What was measured at the start, which is the best point if each of the others drifts further.
            farther: Go back by FARTHER, unless a point before that is within.
        """
        best, near = Point(0.0, here), 0.0
        for share in (*SHARES, FARTHER) if farther else SHARES:
            point = self._at(share)
            if budget.holds(point.measured):
                return self._nearest(budget, near, point, 2)
            if point.measured.drift < best.measured.drift:
                best = point
            near = share
        if farther:
            return point
        self.go(best.share)
        return best

    def _nearest(self, budget: Budget, near: float, far: Point, halvings: int) -> Point:
        """Go to the nearest point found that is within, between a share that is not and a point that is."""
        for _ in range(halvings):
            middle = self._at((near + far.share) / 2)
            if budget.holds(middle.measured):
                far = middle
            else:
                near = middle.share
        self.go(far.share)
        return far

    def _at(self, share: float) -> Point:
        """Move to the network that is this share of the way back, and measure it."""
        self.go(share)
        return Point(share, self._counted.measure())
