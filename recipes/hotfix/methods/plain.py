"""Plain fine-tuning: Adam on the wrong inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from recipes.common.options import RATE
from recipes.common.settings import option
from recipes.hotfix.case import Case
from recipes.hotfix.methods.gradient import GradientMethod
from recipes.hotfix.settings import HotfixSettings


@dataclass(frozen=True)
class PlainOptions:
    """The learning rates of plain fine-tuning, and of the methods that start from it."""

    group: ClassVar[str] = "plain fine-tuning and interpolation"
    plain_lr: tuple[float, ...] = option(
        "learning rates to try", default=(1e-3, 1e-4, 3e-5), nargs="+", **RATE
    )


class FineTuning(GradientMethod):
    """Adam on the wrong inputs, which knows nothing of any other input."""

    title = "plain fine-tuning"
    option_kinds = (PlainOptions,)

    def choices(self, settings: HotfixSettings) -> Sequence[Mapping[str, float]]:
        """The learning rates."""
        return [{"lr": lr} for lr in settings.of(PlainOptions).plain_lr]

    def penalty(
        self, model: nn.Module, case: Case, settings: HotfixSettings, choice: Mapping[str, float]
    ) -> Callable[[], Tensor] | None:
        """Nothing is added."""
        return None
