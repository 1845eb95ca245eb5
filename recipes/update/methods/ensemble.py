"""The ensemble of the old network and the plainly trained one: two networks for each prediction, for reference."""

from __future__ import annotations

from torch import Tensor, nn

from recipes.common.progress import Progress
from recipes.update.case import Case
from recipes.update.methods.method import Update
from recipes.update.methods.plain import PlainTraining
from recipes.update.settings import UpdateSettings


class MeanOfProbabilities(nn.Module):
    """Two networks whose probabilities are averaged.

    Args:
        first: Gives logits ``(n, classes)``.
        second: The same.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, inputs: Tensor) -> Tensor:
        """The logarithms ``(n, classes)`` of the mean probabilities."""
        mean: Tensor = (self.first(inputs).softmax(1) + self.second(inputs).softmax(1)) / 2
        return mean.log()


class Ensemble(PlainTraining):
    """Takes twice the time and memory of one network once it is in production."""

    title = "ensemble of old and plain"

    def run(
        self, case: Case, settings: UpdateSettings, *, seed: int, progress: Progress
    ) -> list[Update]:
        """See :class:`Method`."""
        (plain,) = super().run(case, settings, seed=seed, progress=progress)
        model = MeanOfProbabilities(case.old, plain.model).eval()
        return [Update("", model, plain.inputs, plain.seconds)]
