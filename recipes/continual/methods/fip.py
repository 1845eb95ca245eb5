"""A functionally invariant path: ``FIPOptimizer`` with the remembered inputs as anchors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch.optim.lr_scheduler import LRScheduler

from fipoptim import FIPOptimizer, Solver
from recipes.common.options import COUNT, RATE, fraction, or_none, positive, products
from recipes.common.settings import option
from recipes.common.training import train
from recipes.continual.methods.anchored import AnchoredLearner
from recipes.continual.methods.base import Batches, Method
from recipes.continual.methods.schedules import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class PathOptions:
    """The options of the invariant path; see ``FIPOptimizer`` and ``Solver``.

    Attributes:
        beta: The weight of the new task's loss against the squared output change.
        eps: The length of a step, at the top of its schedule.
        schedule: The course of the step length, a key of ``SCHEDULES``.
        momentum: The share of the last step's gradient that is kept.
        precondition: The geometry of the step.
        products: Metric products of a step.
        max_products: The most products of an adaptive step.
        radius: How far an adaptive step may move the outputs.
        max_drift: The bound that the drift on the anchors never passes.
    """

    beta: float = option("weight of the new task", default=10.0, **RATE)
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
        "bound that drift on the anchors never passes",
        default=None,
        type=or_none(positive),
        metavar="X",
    )


class InvariantPath(AnchoredLearner):
    """Steps of ``FIPOptimizer``, which change the outputs on the anchors as little as they can."""

    options: PathOptions

    def optimizer(self, steps: int) -> tuple[FIPOptimizer, LRScheduler]:
        """The optimizer, and the schedule of the step length over that many steps."""
        options = self.options
        optimizer = FIPOptimizer(
            self.model.parameters(),
            self.known_anchors(),
            beta=options.beta,
            eps=options.eps,
            momentum=options.momentum,
            precondition=options.precondition,
            max_drift=options.max_drift,
            solver=Solver(
                products=options.products,
                max_products=options.max_products,
                radius=options.radius,
            ),
            generator=self.generator,
        )
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


METHOD = Method("fip", "invariant path", InvariantPath, PathOptions, prefixed=False)
