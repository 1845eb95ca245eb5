"""The objective of misaligned input gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fipoptim.secondary import Diversity
from recipes.common.options import RATE, fraction
from recipes.common.settings import option
from recipes.diversity.objectives.objective import Loss, Objective, ObjectiveBatches
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.source import EnsembleSource


@dataclass(frozen=True, kw_only=True)
class MisalignOptions:
    """The options of the objective."""

    group: ClassVar[str] = "misaligned input gradients"

    beta: float = option("weight of the likeness of input gradients", default=0.004, **RATE)
    noise: float = option(
        "largest change of a pixel by noise on the inputs whose gradients are compared",
        default=0.0,
        type=fraction,
        metavar="X",
    )


class Misalign(Objective):
    """Turns input gradients away from those of the start network and of other members (``fipoptim.secondary``)."""

    option_kinds = (MisalignOptions,)

    def weight(self, settings: EnsembleSettings) -> float:
        """See :class:`Objective`."""
        return settings.of(MisalignOptions).beta

    def loss(
        self,
        model: nn.Module,
        others: Sequence[nn.Module],
        source: EnsembleSource,
        generator: torch.Generator,
    ) -> Loss:
        """See :class:`Objective`."""
        noise = source.settings.of(MisalignOptions).noise
        batches = ObjectiveBatches(source, generator, noise=noise)
        return Diversity(model, [source.start, *others], batches)
