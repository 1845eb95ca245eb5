"""Plain training: Adam on the labels of all classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from recipes.common.options import RATE
from recipes.common.progress import Progress
from recipes.common.settings import option
from recipes.update.case import Case
from recipes.update.learning import Loss, Trained
from recipes.update.methods.gradient import GradientMethod
from recipes.update.settings import UpdateSettings


@dataclass(frozen=True)
class PlainOptions:
    """The options of plain training, and of the methods that start from it."""

    group: ClassVar[str] = "plain training, interpolation and ensemble"
    plain_lr: float = option("Adam's highest learning rate", default=3e-3, **RATE)


class PlainTraining(GradientMethod):
    """The cross-entropy of the labels, which knows nothing of the old network's outputs."""

    title = "plain training"
    option_kinds = (PlainOptions,)

    def lr(self, settings: UpdateSettings) -> float:
        """See :class:`GradientMethod`."""
        return settings.of(PlainOptions).plain_lr

    def loss(self, case: Case, settings: UpdateSettings) -> Loss:
        """See :class:`GradientMethod`."""
        return lambda x, z, labels: F.cross_entropy(z, labels)

    def train(
        self, case: Case, settings: UpdateSettings, *, seed: int, progress: Progress
    ) -> Trained:
        """Trains the network, or takes it from the case if it has been trained before."""
        if not case.plain:
            case.plain.append(super().train(case, settings, seed=seed, progress=progress))
        return case.plain[0]
