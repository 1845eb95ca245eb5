"""Pruning at once, followed by training: by magnitude, or at random."""

from __future__ import annotations

from torch import Tensor

from recipes.sparsify.methods.baseline import Baseline
from recipes.sparsify.methods.method import Leg
from recipes.sparsify.ramp import Ramp
from recipes.sparsify.scores import random_scores


class OneShot(Baseline):
    """Prunes the dense network to each sparsity at once, by magnitude, and trains the weights that are left."""

    title = "one-shot, labels"
    each_from_dense = True

    def begin_leg(self, leg: Leg) -> Ramp | None:
        """Prunes the dense network."""
        self.start_over()
        self.hold(leg.sparsity)
        return None


class RandomMasks(OneShot):
    """Prunes the dense network at random and trains the weights that are left."""

    title = "random masks, labels"

    def score(self, weight: Tensor) -> Tensor:
        """Random numbers."""
        return random_scores(weight, self.generator)
