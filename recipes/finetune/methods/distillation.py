"""Distillation: AdamW on the new examples, with the squared distance of the anchors' outputs from the old network's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from recipes.common import processes
from recipes.common.options import RATE
from recipes.common.settings import option
from recipes.finetune.anchoring import anchors_of
from recipes.finetune.case import Case, chosen, count
from recipes.finetune.methods.gradient import GradientMethod, Penalty
from recipes.finetune.methods.method import Choice
from recipes.finetune.settings import FinetuneSettings


@dataclass(frozen=True)
class DistillationOptions:
    """The settings of distillation; there is a run for each rate with each weight."""

    group: ClassVar[str] = "distillation"
    distillation_lr: tuple[float, ...] = option(
        "learning rates, a run each", default=(3e-3,), nargs="+", **RATE
    )
    distillation_weight: tuple[float, ...] = option(
        "weights of the anchors' outputs, a run each", default=(10.0,), nargs="+", **RATE
    )


class Distillation(GradientMethod):
    """The anchors of each step are those of the path."""

    title = "distillation"
    option_kinds = (DistillationOptions,)

    def choices(self, settings: FinetuneSettings) -> Sequence[Choice]:
        """Each learning rate with each weight."""
        own = settings.of(DistillationOptions)
        return [
            {"lr": lr, "weight": weight}
            for lr in own.distillation_lr
            for weight in own.distillation_weight
        ]

    def penalty(
        self,
        model: nn.Module,
        case: Case,
        settings: FinetuneSettings,
        choice: Choice,
        *,
        seed: int,
    ) -> Penalty | None:
        """The mean squared distance on the anchors of the step."""
        anchors = anchors_of(model, case, settings, seed=seed, check=False)

        def distance(step: int) -> Tensor:
            sample = anchors.sample(step)
            inputs = cast(dict[str, Tensor], sample.inputs)
            inputs = chosen(inputs, torch.arange(count(inputs)))
            now = case.output(model(**inputs), inputs).flatten(1)
            # Columns that were cut off are padding, whose outputs are 0.
            moved = (now - sample.reference[:, : now.shape[1]]).square().sum(dim=1)
            return choice["weight"] * processes.mean(moved, anchors.batch_size or len(anchors))

        return distance
