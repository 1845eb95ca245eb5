"""L2-SP: AdamW on the new examples, with the squared distance of the weights from the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from recipes.common.options import RATE
from recipes.common.settings import option
from recipes.finetune.case import Case
from recipes.finetune.heads import new_parameters
from recipes.finetune.methods.gradient import GradientMethod, Penalty
from recipes.finetune.methods.method import Choice, trained
from recipes.finetune.settings import FinetuneSettings


@dataclass(frozen=True)
class L2SPOptions:
    """The settings of L2-SP; there is a run for each rate with each weight."""

    group: ClassVar[str] = "L2-SP"
    l2sp_lr: tuple[float, ...] = option(
        "learning rates, a run each", default=(3e-3,), nargs="+", **RATE
    )
    l2sp_weight: tuple[float, ...] = option(
        "weights of the distance, a run each", default=(0.1,), nargs="+", **RATE
    )


class L2SP(GradientMethod):
    """It needs no inputs but the new ones. The head is new, and does not count in the distance."""

    title = "L2-SP"
    option_kinds = (L2SPOptions,)

    def choices(self, settings: FinetuneSettings) -> Sequence[Choice]:
        """Each learning rate with each weight."""
        own = settings.of(L2SPOptions)
        return [{"lr": lr, "weight": weight} for lr in own.l2sp_lr for weight in own.l2sp_weight]

    def penalty(
        self,
        model: nn.Module,
        case: Case,
        settings: FinetuneSettings,
        choice: Choice,
        *,
        seed: int,
    ) -> Penalty | None:
        """Half the squared distance of the weights."""
        new = {id(p) for p in new_parameters(model)}
        moved = [p for p in trained(model) if id(p) not in new]
        old = [p.detach().clone() for p in moved]

        def distance(step: int) -> Tensor:
            apart = [(p - q).square().sum() for p, q in zip(moved, old, strict=True)]
            return 0.5 * choice["weight"] * torch.stack(apart).sum()

        return distance
