"""Interpolation of weights (WiSE-FT): networks on the straight line from the start to plain fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from recipes.common.options import fraction
from recipes.common.settings import option
from recipes.finetune.case import Case
from recipes.finetune.methods.method import Choice, Run
from recipes.finetune.methods.plain import FineTuning, PlainOptions
from recipes.finetune.settings import FinetuneSettings


@dataclass(frozen=True)
class InterpolationOptions:
    """The networks on the line that are measured."""

    group: ClassVar[str] = "interpolation"
    shares: tuple[float, ...] = option(
        "shares of the way to plain fine-tuning", default=(0.2, 0.4, 0.7), nargs="+", type=fraction
    )


class Interpolation(FineTuning):
    """Plain fine-tuning (Wortsman et al., 2022), of which a share is taken back. Only one run is needed for all."""

    title = "interpolation"
    option_kinds = (PlainOptions, InterpolationOptions)

    def networks(
        self, run: Run, case: Case, settings: FinetuneSettings
    ) -> Sequence[tuple[Choice, nn.Module]]:
        """The networks at each share."""
        found = list[tuple[Choice, nn.Module]]()
        for share in settings.of(InterpolationOptions).shares:
            model = copy.deepcopy(run.model)
            with torch.no_grad():
                for p, old in zip(model.parameters(), case.start.parameters(), strict=True):
                    p.lerp_(old, 1.0 - share)
            found.append(({**run.choice, "share": share}, model))
        return found
