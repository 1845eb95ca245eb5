"""The base of all baselines: Adam on one cycle, and as many epochs as the path gets, or more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from recipes.common.options import COUNT, RATE
from recipes.common.settings import option
from recipes.sparsify.methods.method import Leg, Method, Stepper
from recipes.sparsify.scores import largest, layered_magnitude
from recipes.sparsify.settings import SparsifySettings
from recipes.sparsify.stages import stages


@dataclass(frozen=True, kw_only=True)
class BaselineOptions:
    """The options of all baselines."""

    group: ClassVar[str] = "baselines"

    baseline_epochs: int = option(
        "epochs in the baselines, for each stage that the path takes to a sparsity", **COUNT
    )
    baseline_lr: float = option("Adam's highest learning rate in the baselines", **RATE)


class Baseline(Method):
    """A method that trains with Adam. It keeps the weights with the highest scores and follows labels or outputs."""

    trains_on: ClassVar[Literal["outputs", "labels"]] = "labels"
    option_kinds: ClassVar[tuple[type, ...]] = (BaselineOptions,)

    @classmethod
    def legs(cls, sparsities: Sequence[float], settings: SparsifySettings) -> list[Leg]:
        """One leg to each sparsity; its epochs are those of all stages that the path takes there."""
        parts = stages(sparsities) if settings.waypoints else [[s] for s in sparsities]
        epochs = settings.of(BaselineOptions).baseline_epochs
        return [Leg(s, epochs * len(part)) for part, s in zip(parts, sparsities, strict=True)]

    def score(self, weight: Tensor) -> Tensor:
        """The scores of a parameter's weights, of its shape: their magnitudes relative to their layer's."""
        return layered_magnitude(weight)

    def choose(self, sparsity: float) -> dict[str, Tensor]:
        """Keeps the weights with the highest scores."""
        weights = self.masked.parameters
        scores = {name: self.score(weight.detach()) for name, weight in weights.items()}
        return largest(scores, sparsity, per_layer=self.settings.per_layer)

    def loss(self, batch: Tensor) -> Tensor:
        """The loss of a batch, given by the indices of its inputs."""
        return (
            self.label_loss(batch) if self.trains_on == "labels" else self.distillation_loss(batch)
        )

    def stepper(self, leg: Leg) -> Stepper:
        """Adam on one cycle, in train mode."""
        return self.adam(self.settings.of(BaselineOptions).baseline_lr, self.loss)
