"""Plain training: Adam on the new task only. Methods that train by Adam add to its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from fipoptim.anchors.held_outputs import OutputRange
from recipes.common.options import RATE, fraction, or_none
from recipes.common.settings import option
from recipes.common.training import adam_one_cycle, train
from recipes.continual.methods.base import Batches, Learner, Loss, Method


@dataclass(frozen=True, kw_only=True)
class AdamOptions:
    """Adam on one cycle of the learning rate.

    Attributes:
        lr: The highest learning rate.
        momentum: The first beta; None lets it cycle (see ``adam_one_cycle``).
    """

    lr: float = option("Adam's highest learning rate", default=3e-3, **RATE)
    momentum: float | None = option(
        "Adam's first beta; none lets it cycle",
        default=None,
        type=or_none(fraction),
        metavar="X",
    )


class Plain(Learner):
    """Adam on the loss of the new task's batch, and on what :meth:`holding` adds to it."""

    options: AdamOptions

    def remember(self, inputs: Tensor, labels: Tensor, held: OutputRange | None = None) -> None:
        """Keeps nothing."""

    def state(self) -> Any:
        """None, as nothing is remembered."""
        return None

    def load(self, state: Any) -> None:
        """Does nothing, as nothing is remembered."""

    def remembered_bytes(self) -> int:
        """0, as nothing is remembered."""
        return 0

    def holding(self) -> Callable[[], Tensor] | None:
        """A function that gives the term which each step adds to the loss to hold earlier tasks; None without one."""
        return None

    def objective(self) -> Loss:
        """The loss of outputs and labels of the new task, with what holds the earlier ones."""
        holding = self.holding()

        def loss_and_hold(z: Tensor, labels: Tensor) -> Tensor:
            value = self.loss(z, labels)
            return value if holding is None else value + holding()

        return loss_and_hold

    def optimizer(self, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """The optimizer, and the schedule of its learning rate over that many steps."""
        options = self.options
        return adam_one_cycle(self.model, lr=options.lr, steps=steps, momentum=options.momentum)

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
        return train(
            self.model,
            batches,
            optimizer,
            scheduler,
            loss=self.objective(),
            freeze_batch_norm=self.freeze_batch_norm,
            after_step=after_step,
        )


METHOD = Method("naive", "plain training", Plain, AdamOptions)
