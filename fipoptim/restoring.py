"""Restoring steps, one after the other, until a network is within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.inputs import concatenate
from fipoptim.anchors.measured import Measured
from fipoptim.anchors.sample import Sample
from fipoptim.budget import Budget
from fipoptim.metric.chunks import Form
from fipoptim.metric.metric import AnchorMetric
from fipoptim.parameters import StepParameters, displace, distance
from fipoptim.shards import local, space_of
from fipoptim.solver.restoring import RestoringSteps

PRODUCTS_A_STEP = 8
# The most restoring steps behind a step, with as many products each.
STEPS_BEHIND = 4
# The share of a budget that a step aims at: the first order is not exact.
AIM = 0.95
# How often the damping of a step is raised if the drift falls less than predicted, and the factor.
SHORTER, FACTOR = 4, 8.0
# How often the damping is bisected for the shortest step that is within the budget.
BISECTIONS = 4
# Without a budget, a step that lowers the drift by less than this share is the last one.
LEAST_GAIN = 0.1


@dataclass(frozen=True)
class Restored:
    """What :func:`restore` or :meth:`FIPOptimizer.settle` did.

    Attributes:
        before: The distance from the reference before.
        after: The distance of the network that was left.
        within: Whether that is within the budget; True without one.
        went_back: The share of the way back to the last network known to be within the budget; 0 if restoring steps
            were enough. Only ``settle`` goes back.
        steps: The number of restoring steps.
        products: The number of metric products.
        length: The Euclidean distance that the weights moved.
        seconds: The time that it took.
    """

    before: Measured
    after: Measured
    within: bool
    went_back: float
    steps: int
    products: int
    length: float
    seconds: float

    def __str__(self) -> str:
        """One line: from where to where, and at what price."""
        end = "within the budget" if self.within else "the budget was not reached"
        return (
            f"drift {self.before.drift:.3g} -> {self.after.drift:.3g}, flips {self.before.flips:.2%} -> "
            f"{self.after.flips:.2%} ({end}; {self.steps} steps, {self.products} products, "
            f"{f'{self.went_back:.0%} of the way back, ' if self.went_back else ''}{self.seconds:.1f} s)"
        )


def restore_behind(
    anchors: AnchorBatch,
    parameters: StepParameters,
    budget: Budget,
    form: Callable[[], Form],
    products: int,
) -> Restored:
    """Restore the function behind a step that was worth products, by as many products for each restoring step.

    Args:
        anchors: The anchors.
        parameters: The parameters of the step.
        budget: The budget.
        form: Tells how products are taken.
        products: The products of the step.
    """
    return Restoring(
        anchors,
        parameters.originals,
        budget,
        form=form,
        max_products=STEPS_BEHIND * products,
        frozen=parameters.zeros,
    ).run()


class Restoring:
    """Brings the anchors' model within a budget.

    Steps are taken from all anchors. The budget counts on the check inputs, if there are any.

    Args:
        anchors: The anchors.
        params: The parameters that may move, as the model has them.
        budget: The budget; without a bound, steps are taken while each lowers the drift by a tenth.
        form: Tells how products are taken, once one is needed.
        max_products: The most products of all steps together.
        frozen: For each parameter a bool tensor of its shape, True at weights that do not move.

    Attributes:
        steps: The number of steps taken.
        products: The number of products taken.
        space: The space of flat vectors over the parameters.
    """

    def __init__(
        self,
        anchors: AnchorBatch,
        params: list[Tensor],
        budget: Budget,
        *,
        form: Callable[[], Form],
        max_products: int,
        frozen: Sequence[Tensor] | None = None,
    ) -> None:
        self._anchors, self._originals, self._budget = anchors, params, budget
        self._params, self.space = [local(p) for p in params], space_of(params)
        self._max_products, self._form, self._frozen = max_products, form, frozen
        self.steps = self.products = 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self) -> Restored:
        """Take restoring steps; the weights are put back if one raises."""
        began = time.perf_counter()
        start = [p.clone() for p in self._params]
        try:
            before = here = self._anchors.counted.measure()
            while self.can_go_on(here):
                found = self.step(here)
                gained = here.drift - found.drift
                stopped = gained <= (0 if self._budget.given else LEAST_GAIN * here.drift)
                here = found
                if stopped:
                    break
        except BaseException:
            displace(self._params, start)
            raise
        return Restored(
            before,
            here,
            self._budget.holds(here),
            0.0,
            self.steps,
            self.products,
            distance(self._params, start, self.space),
            time.perf_counter() - began,
        )

    def can_go_on(self, here: Measured) -> bool:
        """Whether products are left, and something to restore: without a budget, any drift that is finite."""
        within = self._budget.given and self._budget.holds(here)
        return not within and 0 < here.drift < math.inf and self.products < self._max_products

    def _sample(self, step: int) -> Sample:
        """All anchors; with ``augment`` also an augmented view."""
        plain = self._anchors.all()
        if self._anchors.augment is None:
            return plain
        view = self._anchors.sample(step)
        return Sample(
            concatenate([plain.inputs, view.inputs]),
            torch.cat([plain.reference, view.reference.to(plain.reference)]),
        )

    @torch.no_grad()
    def step(self, here: Measured) -> Measured:
        """Take one restoring step from the network of now; the weights stay if none lowers the drift.

        Args:
            here: The distance of the network of now from the reference.

        Returns:
            Its distance after the step.
        """
        metric = AnchorMetric(
            self._anchors,
            self._originals,
            sample=self._sample(self.steps),
            form=self._form,
            guard=False,
            frozen=self._frozen,
        )
        residual = metric.residual()
        drift = metric.mean.squared(residual)
        steps = RestoringSteps(
            metric.matvec,
            metric.vjp(metric.mean.weighted(residual)),
            drift,
            max_products=min(PRODUCTS_A_STEP, self._max_products - self.products),
            space=self.space,
        )
        self.products += max(1, steps.products)
        self.steps += 1
        if steps.products == 0:  # no weight changes the outputs
            return here
        start = [p.clone() for p in self._params]

        def at(damping: float) -> Measured:
            displace(self._params, start, metric.unflatten(steps.step(damping)))
            return self._anchors.counted.measure()

        damping = steps.least_damping
        if self._budget.max_drift is not None and self._budget.max_flips is None:
            # The drift of the plain anchors is taken to fall in proportion to that of the sample.
            damping = steps.damping_for(AIM * self._budget.max_drift * drift / here.drift)
        found = at(damping)
        for _ in range(SHORTER):
            if found.drift < here.drift:
                break
            damping *= FACTOR
            found = at(damping)
        else:
            displace(self._params, start)
            return here
        if self._budget.max_flips is not None and self._budget.holds(found):
            found = self._shortest(at, damping, found)
        return found

    def _shortest(
        self, at: Callable[[float], Measured], damping: float, found: Measured
    ) -> Measured:
        """The shortest step that is within the budget, by bisection between ``damping`` and far more than that."""
        low, high = damping, damping * FACTOR**SHORTER
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            tried = at(middle)
            if self._budget.holds(tried):
                low, found = middle, tried
            else:
                high = middle
        at(low)
        return found
