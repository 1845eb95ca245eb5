"""Iterative magnitude pruning with rewinding: the lottery ticket (Frankle et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.sparsify.methods.baseline import Baseline, BaselineOptions
from recipes.sparsify.methods.method import Leg
from recipes.sparsify.ramp import Ramp
from recipes.sparsify.settings import SparsifySettings

ROUND = 0.6  # the largest share of the weights left that one round prunes


def rounds(sparsities: Sequence[float]) -> list[float]:
    """The sparsities after each round, so that no round prunes more than ``ROUND`` of the weights left.

    Args:
        sparsities: The sparsities asked for, in increasing order; all of them are among those returned.
    """
    found = [0.0]
    for sparsity in sparsities:
        while (1 - sparsity) < (1 - found[-1]) * (1 - ROUND) * (1 - 1e-9):
            found.append(1 - (1 - found[-1]) * (1 - ROUND))
        found.append(sparsity)
    return found[1:]


class LotteryTicket(Baseline):
    """Prunes by magnitude in rounds; each rewinds the weights that are left to early in training and trains again."""

    title = "lottery ticket"

    @classmethod
    def full_title(cls, settings: SparsifySettings, *, rewinds: bool) -> str:
        """The method is no lottery ticket if there are no early weights to go back to."""
        return cls.title if rewinds else "iterative, labels"

    @classmethod
    def legs(cls, sparsities: Sequence[float], settings: SparsifySettings) -> list[Leg]:
        """A leg is a round."""
        epochs = settings.of(BaselineOptions).baseline_epochs
        return [Leg(s, epochs, asked=s in sparsities) for s in rounds(sparsities)]

    def begin_leg(self, leg: Leg) -> Ramp | None:
        """Prunes the network that the last round trained, and rewinds it."""
        self.hold(leg.sparsity)
        if self.early_state is not None:
            self.masked.hold_only(self.masked.masks, self.early_state)
        return None
