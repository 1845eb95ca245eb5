"""The objective of distance in weight space: as far as the function allows, with nothing else asked of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from recipes.common.options import RATE
from recipes.common.settings import option
from recipes.diversity.objectives.objective import Loss, Objective
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.source import EnsembleSource

_OFFSET = (
    1e-3  # the length of the random vector that says where to go from the start network itself
)


@dataclass(frozen=True, kw_only=True)
class FarOptions:
    """The options of the objective."""

    group: ClassVar[str] = "distance in weight space"

    far_beta: float = option("weight of the distance from other members", default=0.001, **RATE)


class Far(Objective):
    r"""The loss :math:`-\frac1k \sum_j \|\theta - \theta_j\|` over the start network and other members."""

    option_kinds = (FarOptions,)

    def weight(self, settings: EnsembleSettings) -> float:
        """See :class:`Objective`."""
        return settings.of(FarOptions).far_beta

    def loss(
        self,
        model: nn.Module,
        others: Sequence[nn.Module],
        source: EnsembleSource,
        generator: torch.Generator,
    ) -> Loss:
        """See :class:`Objective`. A random vector of a thousandth gives the distance a gradient where it is zero."""
        moving = list(model.parameters())
        origins = []
        for other in (source.start, *others):
            drawn = [torch.randn(p.shape, generator=generator).to(p) for p in moving]
            size = _OFFSET / torch.stack([d.square().sum() for d in drawn]).sum().sqrt()
            fixed = (p.detach().clone() for p in other.parameters())
            origins.append([p + size * d for p, d in zip(fixed, drawn, strict=True)])

        def loss() -> Tensor:
            distances = [
                torch.stack(
                    [(p - o).square().sum() for p, o in zip(moving, origin, strict=True)]
                ).sum()
                for origin in origins
            ]
            return -torch.stack(distances).sqrt().mean()

        return loss
