"""Adam on the loss of the wrong inputs, alone or with a penalty; the base of the methods that do so."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recipes.common.progress import Progress
from recipes.hotfix.case import Case
from recipes.hotfix.methods.method import Method, edit_loss, take_steps
from recipes.hotfix.settings import HotfixSettings


class GradientMethod(Method):
    """Adam on the wrong inputs' loss and what :meth:`penalty` adds, until all are right."""

    @abstractmethod
    def penalty(
        self, model: nn.Module, case: Case, settings: HotfixSettings, choice: Mapping[str, float]
    ) -> Callable[[], Tensor] | None:
        """Makes the function that gives what is added to the loss of a step; None adds nothing."""

    def fix(
        self,
        model: nn.Module,
        case: Case,
        settings: HotfixSettings,
        choice: Mapping[str, float],
        *,
        seed: int,
        progress: Progress,
    ) -> tuple[int, dict[str, Any]]:
        """See :class:`Method`; ``choice["lr"]`` is Adam's learning rate."""
        penalty = self.penalty(model, case, settings, choice)
        optimizer = torch.optim.Adam(model.parameters(), lr=choice["lr"])

        def step() -> None:
            optimizer.zero_grad()
            loss = edit_loss(model, case)
            (loss if penalty is None else loss + penalty()).backward()
            optimizer.step()

        taken = take_steps(model, case, step, most=settings.max_steps, progress=progress)
        return taken, {}
