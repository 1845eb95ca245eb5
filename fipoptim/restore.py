"""Bring back the function of a network that has already changed, whoever trained it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch, Sample
from fipoptim.anchors.evaluation import unwrap
from fipoptim.anchors.inputs import concatenate
from fipoptim.checks import check_number, check_type
from fipoptim.metric.chunks import Form
from fipoptim.metric.metric import AnchorMetric
from fipoptim.metric.probe import probe
from fipoptim.parameters import displace
from fipoptim.solver.restoring import RestoringSteps

PRODUCTS_A_STEP = 8
# The share of a budget that a step aims at: the first order is not exact.
AIM = 0.95
# How often the damping of a step is raised if the drift falls less than predicted, and the factor.
SHORTER, FACTOR = 4, 8.0
# How often the damping is bisected for the shortest step that is within the budget.
BISECTIONS = 4
# Without a budget, a step that lowers the drift by less than this share is the last one.
LEAST_GAIN = 0.1


@dataclass(frozen=True)
class Measured:
    """The distance of a network from the reference, on all anchors.

    Attributes:
        drift: The mean of :math:`‖z - z_{ref}‖²`.
        flips: The share of anchors whose prediction is not that of the reference.
    """

    drift: float
    flips: float


@dataclass(frozen=True)
class Restored:
    """What :func:`restore` did.

    Attributes:
        before: The distance from the reference before.
        after: The distance of the network that was left.
        within: Whether that is within the budget; True without one.
        steps: The number of restoring steps.
        products: The number of metric products.
        length: The Euclidean distance that the weights moved.
        seconds: The time that it took.
    """

    before: Measured
    after: Measured
    within: bool
    steps: int
    products: int
    length: float
    seconds: float

    def __str__(self) -> str:
        """One line: from where to where, and at what price."""
        end = "within the budget" if self.within else "the budget was not reached"
        return (
            f"drift {self.before.drift:.3g} -> {self.after.drift:.3g}, flips {self.before.flips:.2%} -> "
            f"{self.after.flips:.2%} ({end}; {self.steps} steps, {self.products} products, {self.seconds:.1f} s)"
        )


def restore(
    model: torch.nn.Module,
    anchors: AnchorBatch,
    *,
    max_drift: float | None = None,
    max_flips: float | None = None,
    params: Iterable[Tensor] | None = None,
    max_products: int = 64,
    form: Form | None = None,
) -> Restored:
    r"""Bring a network's outputs on the anchors back to the reference, by restoring steps alone.

    A restoring step solves :math:`(g + \mu I) v = -J^\top r / N` from a few products. It needs neither labels nor the
    gradient of a task. :math:`\mu` is chosen so that the network lands **at** the budget: of all steps that reach it,
    to first order, this one is the shortest, so that what the network has learnt since is changed the least. A
    measurement on all anchors confirms it.

    With ``augment`` each step also sees one augmented view of the anchors. The budget counts on the plain anchors.

    Args:
        model: The network, which is the anchors' model.
        anchors: The anchors; :class:`AnchorBatch` with ``reference=`` takes the network of before.
        max_drift: The drift to reach: ``anchors.drift() <= max_drift``.
        max_flips: The share of anchors whose prediction may differ from the reference's, in [0, 1).
        params: The parameters that may move; None takes those that require a gradient.
        max_products: The most products of all steps together; each costs about a forward and a backward pass over the
            anchors.
        form: How products are taken, as in :class:`FIPOptimizer`; None probes it.

    Returns:
        The account of it. Without a budget, steps are taken until one lowers the drift by less than a tenth.
        If the budget cannot be reached, the network with the smallest drift found is left, and ``within`` is False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a budget is out of range, or ``model`` is not the anchors' model.
        RuntimeError: If the outputs are not finite. The weights are then as they were.
    """
    check_type("anchors", anchors, AnchorBatch, "build one with AnchorBatch(model, inputs)")
    if unwrap(model) is not anchors.model:
        raise ValueError("model: is not the anchors' model; build the AnchorBatch on this one.")
    if max_drift is not None:
        check_number("max_drift", max_drift)
    if max_flips is not None:
        check_number("max_flips", max_flips, below=1.0)
    if not isinstance(max_products, int) or isinstance(max_products, bool) or max_products < 1:
        raise ValueError(f"max_products: must be an integer >= 1, got {max_products!r}.")
    chosen: list[Tensor] = (
        [p for p in model.parameters() if p.requires_grad] if params is None else list(params)
    )
    budget = _Budget(max_drift, max_flips)
    return _Restoring(anchors, chosen, budget, max_products, form).run()


@dataclass(frozen=True)
class _Budget:
    max_drift: float | None
    max_flips: float | None

    @property
    def given(self) -> bool:
        return self.max_drift is not None or self.max_flips is not None

    def holds(self, found: Measured) -> bool:
        """Whether a network is within; without a budget none is, as there is always something to gain."""
        within = self.max_drift is None or found.drift <= self.max_drift
        return self.given and within and (self.max_flips is None or found.flips <= self.max_flips)


class _Restoring:
    def __init__(
        self,
        anchors: AnchorBatch,
        params: list[Tensor],
        budget: _Budget,
        max_products: int,
        form: Form | None,
    ) -> None:
        self._anchors, self._params, self._budget = anchors, params, budget
        self._left = max_products
        self._form: Form = probe(anchors, params) if form is None else form

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self) -> Restored:
        began, steps, products = time.perf_counter(), 0, self._left
        start = [p.clone() for p in self._params]
        try:
            before = here = self._measure()
            while not self._budget.holds(here) and self._left > 0 and here.drift > 0:
                found = self._step(here, steps)
                steps += 1
                gained = here.drift - found.drift
                stopped = gained <= (0 if self._budget.given else LEAST_GAIN * here.drift)
                here = found
                if stopped:
                    break
        except BaseException:
            displace(self._params, start)
            raise
        moved = torch.stack(
            [(p - q).double().norm().cpu() for p, q in zip(self._params, start, strict=True)]
        )
        return Restored(
            before,
            here,
            self._budget.holds(here) or not self._budget.given,
            steps,
            products - self._left,
            float(moved.norm()),
            time.perf_counter() - began,
        )

    def _measure(self) -> Measured:
        drift = self._anchors.drift()
        if not math.isfinite(drift):
            return Measured(math.inf, 1.0)
        count = len(self._anchors)
        # A whole number of flips over N: a budget of 0.05 allows 6 of 120, which 1 - 0.95 would exceed by rounding.
        return Measured(drift, round((1.0 - self._anchors.predictions_kept()) * count) / count)

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

    def _step(self, here: Measured, number: int) -> Measured:
        """Take one restoring step; the weights stay if none lowers the drift."""
        metric = AnchorMetric(
            self._anchors, self._params, sample=self._sample(number), form=self._form, guard=False
        )
        residual = metric.residual()
        drift = metric.mean.squared(residual)
        steps = RestoringSteps(
            metric.matvec,
            metric.vjp(metric.mean.weighted(residual)),
            drift,
            max_products=min(PRODUCTS_A_STEP, self._left),
        )
        self._left -= max(1, steps.products)
        if steps.products == 0:  # no weight changes the outputs
            return here
        start = [p.clone() for p in self._params]

        def go(damping: float) -> None:
            displace(self._params, start, metric.unflatten(steps.step(damping)))

        def at(damping: float) -> Measured:
            go(damping)
            return self._measure()

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
        if self._budget.holds(found) and self._budget.max_flips is not None:
            damping, found = self._shortest(at, damping, found)
            go(damping)
        return found

    def _shortest(
        self, at: Callable[[float], Measured], damping: float, found: Measured
    ) -> tuple[float, Measured]:
        """The largest damping within the budget, and where it leads: bisected between ``damping`` and far more."""
        low, high = damping, damping * FACTOR**SHORTER
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            tried = at(middle)
            if self._budget.holds(tried):
                low, found = middle, tried
            else:
                high = middle
        return low, found
