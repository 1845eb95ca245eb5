"""Adam on a loss of the labelled inputs and of the old network's outputs; the base of the methods that do so."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence

from recipes.common.progress import Progress
from recipes.common.training import adam_one_cycle
from recipes.update.case import Case
from recipes.update.learning import Loss, Trained, learn
from recipes.update.methods.method import Method, Update
from recipes.update.settings import UpdateSettings


class GradientMethod(Method):
    """Adam on one cycle."""

    @abstractmethod
    def lr(self, settings: UpdateSettings) -> float:
        """The highest learning rate."""

    @abstractmethod
    def loss(self, case: Case, settings: UpdateSettings) -> Loss:
        """The loss of a step."""

    def names(self, settings: UpdateSettings) -> Sequence[str]:
        """One network."""
        return [""]

    def epochs(self, settings: UpdateSettings) -> float:
        """See :class:`Method`."""
        return settings.baseline_epochs

    def train(
        self, case: Case, settings: UpdateSettings, *, seed: int, progress: Progress
    ) -> Trained:
        """Trains a copy of the network that all methods start with."""
        model = copy.deepcopy(case.start)
        return learn(
            model,
            case.task,
            *adam_one_cycle(model, lr=self.lr(settings), steps=self.steps(case, settings)),
            self.loss(case, settings),
            batch_size=settings.batch_size,
            epochs=self.epochs(settings),
            augment=case.augment,
            freeze_batch_norm=settings.batch_norm == "frozen",
            seed=seed,
            progress=progress,
        )

    def run(
        self, case: Case, settings: UpdateSettings, *, seed: int, progress: Progress
    ) -> list[Update]:
        """See :class:`Method`."""
        trained = self.train(case, settings, seed=seed, progress=progress)
        seen = self.steps(case, settings) * settings.batch_size
        return [Update("", trained.model, seen, trained.seconds)]
