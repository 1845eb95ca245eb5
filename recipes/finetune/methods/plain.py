"""Plain fine-tuning: AdamW on the new examples alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from recipes.common.options import RATE
from recipes.common.settings import option
from recipes.finetune.case import Case
from recipes.finetune.methods.gradient import GradientMethod, Penalty
from recipes.finetune.methods.method import Choice
from recipes.finetune.settings import FinetuneSettings


@dataclass(frozen=True)
class PlainOptions:
    """The learning rates of plain fine-tuning, and of the interpolation that starts from it."""

    group: ClassVar[str] = "plain fine-tuning and interpolation"
    plain_lr: tuple[float, ...] = option(
        "learning rates, a run each", default=(3e-3,), nargs="+", **RATE
    )


class FineTuning(GradientMethod):
    """AdamW on the new examples, which knows nothing of any other input."""

    title = "plain fine-tuning"
    option_kinds: ClassVar[tuple[type, ...]] = (PlainOptions,)

    def choices(self, settings: FinetuneSettings) -> Sequence[Choice]:
        """The learning rates."""
        return [{"lr": lr} for lr in settings.of(PlainOptions).plain_lr]

    def penalty(
        self,
        model: nn.Module,
        case: Case,
        settings: FinetuneSettings,
        choice: Choice,
        *,
        seed: int,
    ) -> Penalty | None:
        """Nothing is added."""
        return None
