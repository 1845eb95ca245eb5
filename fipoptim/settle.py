"""The promise about the network that is kept: restoring steps bring it within the budget, or it goes back."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.measured import Measured
from fipoptim.budget import ADVICE, Budget
from fipoptim.metric.chunks import Form
from fipoptim.parameters import StepParameters, displace, distance
from fipoptim.restoring import Restored, Restoring
from fipoptim.state import last_within

# The shares of the way back that are tried before restoring steps. They cost a forward pass each and little of what was
# learnt: the function drifts on the way by noise as well, and that is what goes first.
FIRST_SHARES = (0.05, 0.1, 0.2)
# The share of the way back that is needed at last is found by this many halvings: to a hundredth.
HALVINGS = 7
# How often the first share that is within is halved.
FIRST_HALVINGS = 2
# The most products of all restoring steps of one settlement.
MAX_PRODUCTS = 64
# A round is the last one if it leaves more than this share of the drift.
LEAST_GAIN = 0.98


@torch.no_grad()
def settle(
    anchors: AnchorBatch,
    parameters: StepParameters,
    budget: Budget,
    state: Mapping[Tensor, Any],
    *,
    form: Form,
) -> Restored:
    """Bring the anchors' model within the budget.

    In turns, the network goes back a little on the straight line to the last one that was within, if that lowers the
    drift, and takes a restoring step, until it lands at the budget. Neither alone comes as far for as little of what
    was learnt. If they do not reach it, the network goes back on the line, no further than it must, up to a hundredth.

    Args:
        anchors: The anchors; the budget counts on their check inputs, if there are any.
        parameters: The parameters that may move.
        budget: The budget, with a bound at least.
        state: The optimizer's state, which knows the last network that was within.
        form: How products are taken.

    Raises:
        RuntimeError: If the network cannot be brought within. The weights are then as they were.
    """
    began = time.perf_counter()
    start = [p.clone() for p in parameters.tensors]
    try:
        found = _settled(anchors, parameters, budget, last_within(state, parameters.tensors), form)
    except BaseException:
        displace(parameters.tensors, start)
        raise
    length = distance(parameters.tensors, start)
    return dataclasses.replace(found, length=length, seconds=time.perf_counter() - began)


def _settled(
    anchors: AnchorBatch,
    parameters: StepParameters,
    budget: Budget,
    within: list[Tensor] | None,
    form: Form,
) -> Restored:
    before = here = anchors.counted.measure()
    restoring = Restoring(
        anchors,
        parameters.tensors,
        budget,
        form=form,
        max_products=MAX_PRODUCTS,
        frozen=parameters.zeros_to_keep(),
    )
    kept = 1.0  # of the way from the last network within
    while not budget.holds(here):
        start = here.drift
        if within is not None:
            share, here = WayBack(anchors, parameters.tensors, within).first(budget, here)
            kept *= 1.0 - share
        if not budget.holds(here) and restoring.can_go_on(here):
            here = restoring.step(here)
        if not here.drift < LEAST_GAIN * start or not restoring.can_go_on(here):
            break
    found = Restored(
        before, here, budget.holds(here), 1.0 - kept, restoring.steps, restoring.products, 0.0, 0.0
    )
    if found.within:
        return found
    if within is not None:
        last = WayBack(anchors, parameters.tensors, within).last(budget)
        if last is not None:
            share, here = last
            share = 1.0 - kept * (1.0 - share)
            return dataclasses.replace(found, after=here, within=True, went_back=share)
    raise RuntimeError(
        f"{budget.broken(before)}. Restoring steps came to a drift of {found.after.drift:.6g} with "
        f"{found.after.flips:.4%} of the predictions changed, and no network within the budget lies on the way "
        f"back. The weights are as they were. {ADVICE}"
    )


class WayBack:
    """The straight line from a network to the last one that was within the budget.

    Args:
        anchors: The anchors; the budget counts on their ``counted`` inputs.
        params: The parameters of now, which are moved in place.
        within: The values to which the line leads.
    """

    def __init__(self, anchors: AnchorBatch, params: list[Tensor], within: list[Tensor]) -> None:
        self._counted, self._params = anchors.counted, params
        self._here = [p.clone() for p in params]
        self._within = within

    def first(self, budget: Budget, before: Measured) -> tuple[float, Measured]:
        """Go back by the least of a few small shares that is within, or else by that with the least drift.

        Returns:
            The share, which is 0 if none lowers the drift, and the distance from the reference there.
        """
        best = (0.0, before)
        for near, share in itertools.pairwise((0.0, *FIRST_SHARES)):
            found = self._at(share)
            if budget.holds(found):
                return self._nearest(budget, near, (share, found), FIRST_HALVINGS)
            if found.drift < best[1].drift:
                best = (share, found)
        self._go(best[0])
        return best

    def last(self, budget: Budget) -> tuple[float, Measured] | None:
        """Go back to the nearest point found that is within the budget; None if there is none."""
        found = self._at(1.0)
        return self._nearest(budget, 0.0, (1.0, found), HALVINGS) if budget.holds(found) else None

    def _nearest(
        self, budget: Budget, near: float, far: tuple[float, Measured], halvings: int
    ) -> tuple[float, Measured]:
        """Go to the nearest point found that is within, between a share that is not and a point that is."""
        for _ in range(halvings):
            middle = (near + far[0]) / 2
            found = self._at(middle)
            if budget.holds(found):
                far = (middle, found)
            else:
                near = middle
        self._go(far[0])
        return far

    def _at(self, share: float) -> Measured:
        """Move to the network that is this share of the way back, and measure it."""
        self._go(share)
        return self._counted.measure()

    def _go(self, share: float) -> None:
        """Move to the network that is this share of the way back."""
        if share in (0.0, 1.0):  # bit for bit
            displace(self._params, self._here if share == 0.0 else self._within)
        else:
            between = torch._foreach_lerp(self._here, self._within, share)
            torch._foreach_copy_(self._params, list(between))
