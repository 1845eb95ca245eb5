"""A functionally invariant path: ``FIPOptimizer`` with the remembered inputs as anchors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from fipoptim import FIPOptimizer, Solver
from fipoptim.anchors.measured import Measured
from recipes.common.networks import path_groups
from recipes.common.options import COUNT, RATE, automatic, fraction, or_none, positive, products
from recipes.common.settings import option
from recipes.common.training import train
from recipes.continual.methods.anchored import AnchoredLearner
from recipes.continual.methods.base import Batches, Method
from recipes.continual.methods.schedules import SCHEDULES
from recipes.continual.settings import ContinualSettings

TITLE = "invariant path"
CHECKED = (
    1 / 3
)  # the share of the remembered inputs on which a budget counts, unless another is asked for


@dataclass(frozen=True, kw_only=True)
class PathOptions:
    """The options of the invariant path; see ``FIPOptimizer`` and ``Solver``.

    Attributes:
        beta: The weight of the new task's loss against the squared output change; "auto" leaves it to the optimizer.
        eps: The length of a step, at the top of its schedule.
        schedule: The course of the step length, a key of ``SCHEDULES``.
        momentum: The share of the last step's gradient that is kept.
        precondition: The geometry of the step.
        products: Metric products of a step.
        max_products: The most products of an adaptive step.
        radius: How far an adaptive step may move the outputs.
        max_drift: The most drift once a task is learnt.
        max_flips: The largest share of predictions that has changed once a task is learnt.
        check: The share of the remembered inputs that no step sees and on which these two count; 0 lets them count on
            the anchors themselves, and None is a third with a budget.
    """

    beta: float | str = option(
        "weight of the new task; auto, with a budget, chooses it",
        default=10.0,
        type=automatic,
        metavar="X",
    )
    eps: float = option("length of a step, at the top of its schedule", default=0.8, **RATE)
    schedule: str = option(
        "course of the step length", default="one-cycle", choices=list(SCHEDULES)
    )
    momentum: float = option(
        "share of the last step's gradient that is kept", default=0.0, type=fraction, metavar="X"
    )
    precondition: str | None = option(
        "geometry of the step",
        default="adam",
        type=or_none(str),
        choices=["adam", "muon", None],
        metavar="{adam,muon,none}",
    )
    products: str | int = option(
        "metric products a step: a number, or adaptive",
        default="adaptive",
        type=products,
        metavar="N",
    )
    max_products: int = option("most products of an adaptive step", default=8, **COUNT)
    radius: float | None = option(
        "how far a step may move the outputs on the anchors",
        default=None,
        type=or_none(positive),
        metavar="X",
    )
    max_drift: float | None = option(
        "budget: the most drift on the check inputs once a task is learnt",
        default=None,
        type=or_none(positive),
        metavar="X",
    )
    max_flips: float | None = option(
        "budget: the largest share of predictions on the check inputs that has changed once a task is learnt",
        default=None,
        type=or_none(fraction),
        metavar="X",
    )
    check: float | None = option(
        "share of the remembered inputs that no step sees and on which the budget counts; 0 counts it on the anchors, "
        "none is a third with a budget",
        default=None,
        type=or_none(fraction),
        metavar="SHARE",
    )

    @property
    def budget(self) -> bool:
        """Whether there is a budget."""
        return self.max_drift is not None or self.max_flips is not None

    @property
    def set_aside(self) -> float | None:
        """The share of the remembered inputs on which the budget counts; None if none are set aside."""
        share = CHECKED if self.check is None else self.check
        return share if self.budget and share > 0 else None

    def fault(self, settings: ContinualSettings) -> str | None:
        """See :attr:`Method.fault`."""
        if not self.budget:
            needs = "needs a budget; give --max-flips or --max-drift"
            if self.beta == "auto":
                return f"beta: auto {needs}"
            return None if self.check is None else f"check: {self.check:g} {needs}"
        if self.set_aside is None:
            return None
        checked = round(self.set_aside * settings.anchors)
        if not 0 < checked < settings.anchors:
            return (
                f"check: {self.set_aside:.3g} of {settings.anchors} remembered inputs is {checked}, but the steps and "
                "the budget need one each; give another share or more --anchors"
            )
        if settings.anchors - checked < (settings.anchors_drawn or 0):
            return (
                f"anchor-batch: {settings.anchors_drawn} is more than the {settings.anchors - checked} anchors that "
                f"are left when {checked} of {settings.anchors} are set aside (--check)"
            )
        return None


class InvariantPath(AnchoredLearner):
    """Steps of ``FIPOptimizer``, which change the outputs on the anchors as little as they can."""

    options: PathOptions

    def set_aside(self) -> float | None:
        """See :class:`AnchoredLearner`: with a budget some inputs are check inputs."""
        return self.options.set_aside

    def counted(self) -> Measured | None:
        """See :class:`Learner`; on the check inputs, or on the anchors if there are none."""
        return self.known_anchors().counted.measure() if self.options.budget else None

    def optimizer(self, steps: int) -> tuple[FIPOptimizer, LRScheduler]:
        """The optimizer, and the schedule of the step length over that many steps.

        With a budget the last of these steps ends by bringing the network within it, and prints what that took.
        """
        options = self.options
        optimizer = FIPOptimizer(
            path_groups(self.model),
            self.known_anchors(),
            beta=options.beta,
            eps=options.eps,
            momentum=options.momentum,
            precondition=options.precondition,
            max_drift=options.max_drift,
            max_flips=options.max_flips,
            check_every=None if options.budget else 1,
            solver=Solver(
                products=options.products,
                max_products=options.max_products,
                radius=options.radius,
            ),
            generator=self.generator,
        )
        if options.budget:
            _settle_after(optimizer, steps)
        return optimizer, SCHEDULES[options.schedule](optimizer, options.eps, steps)

    def learn(
        self,
        batches: Batches,
        *,
        steps: int,
        after_step: Callable[[int], None] | None = None,
        record: tuple[int, Path] | None = None,
    ) -> float:
        """See :class:`Learner`."""
        optimizer, scheduler = self.optimizer(steps)
        recording: AbstractContextManager[object] = contextlib.nullcontext()
        if record is not None:
            every, folder = record
            recording = optimizer.record(every=every, folder=folder)
        with recording:
            return train(
                self.model,
                batches,
                optimizer,
                scheduler,
                loss=self.loss,
                freeze_batch_norm=self.freeze_batch_norm,
                after_step=after_step,
            )


def _settle_after(optimizer: FIPOptimizer, steps: int) -> None:
    """Brings the network within the budget at the end of step number ``steps``, before anybody else sees it."""
    count = itertools.count(1)

    def settle(*_: Any) -> None:
        if next(count) == steps:
            tqdm.write(f"{TITLE}, settled: {optimizer.settle()}")

    optimizer.register_step_post_hook(settle)


METHOD = Method("fip", TITLE, InvariantPath, PathOptions, prefixed=False, fault=PathOptions.fault)
