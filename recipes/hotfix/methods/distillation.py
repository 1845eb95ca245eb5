"""Distillation: Adam on the wrong inputs, with the squared distance of the anchors' outputs from the old network's."""

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
class DistillationOptions:
    """The settings of distillation that are tried, each rate with each weight."""

    group: ClassVar[str] = "distillation"
    distillation_lr: tuple[float, ...] = option(
        "learning rates to try", default=(3e-4, 1e-4, 3e-5), nargs="+", **RATE
    )
    distillation_weight: tuple[float, ...] = option(
        "weights of the anchors' outputs to try", default=(0.1, 0.3, 1.0, 3.0), nargs="+", **RATE
    )


class Distillation(GradientMethod):
    """The anchors of each step are drawn and augmented as those of the path."""

    title = "distillation"
    option_kinds = (DistillationOptions,)

    def choices(self, settings: HotfixSettings) -> Sequence[Mapping[str, float]]:
        """Each learning rate with each weight."""
        own = settings.of(DistillationOptions)
        return [
            {"lr": lr, "weight": weight}
            for lr in own.distillation_lr
            for weight in own.distillation_weight
        ]

    def penalty(
        self, model: nn.Module, case: Case, settings: HotfixSettings, choice: Mapping[str, float]
    ) -> Callable[[], Tensor] | None:
        """The mean squared distance on a batch of anchors."""

        def distance() -> Tensor:
            drawn = torch.randperm(len(case.anchors))[: settings.anchor_batch]
            inputs = case.augmented(case.anchors[drawn])
            with torch.no_grad():
                reference = case.old(inputs)
            moved: Tensor = (model(inputs) - reference).square().sum(dim=1).mean()
            return choice["weight"] * moved

        return distance
