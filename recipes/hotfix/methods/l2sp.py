"""L2-SP: Adam on the wrong inputs, with the squared distance of the weights from the old network's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from recipes.common.options import RATE
from recipes.common.settings import option
from recipes.hotfix.case import Case
from recipes.hotfix.methods.gradient import GradientMethod
from recipes.hotfix.settings import HotfixSettings


@dataclass(frozen=True)
class L2SPOptions:
    """The settings of L2-SP that are tried, each rate with each weight."""

    group: ClassVar[str] = "L2-SP"
    l2sp_lr: tuple[float, ...] = option(
        "learning rates to try", default=(1e-4, 3e-5), nargs="+", **RATE
    )
    l2sp_weight: tuple[float, ...] = option(
        "weights of the distance to try", default=(0.1, 1.0, 10.0), nargs="+", **RATE
    )


class L2SP(GradientMethod):
    """It needs no inputs but the wrong ones."""

    title = "L2-SP"
    option_kinds = (L2SPOptions,)

    def choices(self, settings: HotfixSettings) -> Sequence[Mapping[str, float]]:
        """Each learning rate with each weight."""
        own = settings.of(L2SPOptions)
        return [{"lr": lr, "weight": weight} for lr in own.l2sp_lr for weight in own.l2sp_weight]

    def penalty(
        self, model: nn.Module, case: Case, settings: HotfixSettings, choice: Mapping[str, float]
    ) -> Callable[[], Tensor] | None:
        """Half the squared distance of the weights."""
        old = [p.detach() for p in case.old.parameters()]

        def distance() -> Tensor:
            apart = [(p - q).square().sum() for p, q in zip(model.parameters(), old, strict=True)]
            return 0.5 * choice["weight"] * torch.stack(apart).sum()

        return distance
