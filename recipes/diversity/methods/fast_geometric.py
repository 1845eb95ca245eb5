"""Fast geometric ensembling (Garipov et al., 2018)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
from torch.optim.lr_scheduler import LambdaLR

from recipes.common.data import Task
from recipes.common.options import RATE
from recipes.common.settings import option
from recipes.common.training import minibatches, steps_an_epoch, train
from recipes.diversity.methods.method import Method
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.source import EnsembleSource, Member


@dataclass(frozen=True, kw_only=True)
class FastGeometricOptions:
    """The options of fast geometric ensembling."""

    group: ClassVar[str] = "fast geometric ensembling"

    cycle_epochs: float = option("epochs of a cycle of the learning rate", default=2.0, **RATE)
    # SGD with momentum; the lowest rate of a cycle is a hundredth of this.
    cycle_lr: float = option("highest learning rate of a cycle", default=0.02, **RATE)


class FastGeometric(Method):
    """Trains on by SGD with a cyclic learning rate; a member is the network at each lowest rate."""

    own_option_kinds = (FastGeometricOptions,)

    def total_steps(self, task: Task, settings: EnsembleSettings) -> int:
        """See :class:`Method`."""
        return settings.members * _cycle_steps(task, settings)

    def members(self, source: EnsembleSource, files: Sequence[Path]) -> Iterator[Member]:
        """Trains through a cycle for each member."""
        settings, options = source.settings, source.settings.of(FastGeometricOptions)
        model = copy.deepcopy(source.start)
        steps = _cycle_steps(source.task, settings)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=options.cycle_lr, momentum=0.9, weight_decay=5e-4
        )

        def share_of_highest(step: int) -> float:
            """The learning rate rises from the lowest to the highest and falls again, in each cycle."""
            place = (step % steps) / steps
            return 0.01 + 0.99 * (1 - abs(2 * place - 1))

        scheduler = LambdaLR(optimizer, share_of_highest)
        epochs = math.ceil(settings.members * options.cycle_epochs) + 1
        batches = minibatches(
            source.task, batch_size=settings.batch_size, epochs=epochs, seed=source.seed
        )
        for _ in range(settings.members):
            train(
                model,
                ((source.augmented(x), y) for x, y in islice(batches, steps)),
                optimizer,
                scheduler,
                autocast=settings.autocast,
                after_step=lambda step: source.progress(1, "cycle"),
            )
            yield Member(copy.deepcopy(model.state_dict()))


def _cycle_steps(task: Task, settings: EnsembleSettings) -> int:
    """The number of steps of a cycle."""
    epochs = settings.of(FastGeometricOptions).cycle_epochs
    return max(2, round(epochs * steps_an_epoch(task, settings.batch_size)))
