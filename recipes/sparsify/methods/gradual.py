"""Gradual magnitude pruning (Zhu and Gupta, 2017), on labels or on the dense network's outputs."""

from __future__ import annotations

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
