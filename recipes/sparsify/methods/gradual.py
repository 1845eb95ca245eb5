"""Gradual magnitude pruning (Zhu and Gupta, 2017), on labels or on the dense network's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.common.features import WithFeatures
from recipes.sparsify.features import (
    FEATURE_INPUTS,
    deviations,
    distance,
    feature_modules,
)
from recipes.sparsify.methods.baseline import Baseline
from recipes.sparsify.methods.method import Leg
from recipes.sparsify.ramp import Ramp


class Gradual(Baseline):
    """The sparsity rises during training; the weights with the largest magnitudes are kept."""

    title = "gradual, labels"

    def begin_leg(self, leg: Leg) -> Ramp | None:
        """Goes on from the sparsity before."""
        return Ramp.over(self.sparsity, leg.sparsity, self.leg_steps)


class GradualDistillation(Gradual):
    """Gradual magnitude pruning that follows the dense network's outputs and reads no label."""

    title = "gradual, distilled"
    trains_on = "outputs"


class GradualFeatures(GradualDistillation):
    """Follows what the dense network's layers compute on the way, too (Romero et al., 2015)."""

    title = "gradual, distilled with features"

    def prepare(self) -> None:
        """Finds the features and their deviations."""
        names = feature_modules(self.dense)
        self.student, self.teacher = (
            WithFeatures(self.model, names),
            WithFeatures(self.dense, names),
        )
        self.scales = deviations(self.teacher, self.inputs.images[:FEATURE_INPUTS])

    def loss(self, batch: Tensor) -> Tensor:
        """The distillation loss and the distance of the features.

        A drift of ``feature_weight`` counts as half as much divergence: near zero the divergence is half the drift.
        """
        inputs = self.inputs.augmented(batch)
        with torch.no_grad():
            reference, *features = self.teacher(inputs)
        z, *found = self.student(inputs)
        weight = self.settings.feature_weight / 2
        return self.divergence(z, reference) + weight * distance(found, features, self.scales)
