"""Interpolation of weights (WiSE-FT): as far toward a fine-tuned network as it takes to be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recipes.common.progress import Progress
from recipes.common.training import outputs
from recipes.hotfix.case import AT_ONCE, Case
from recipes.hotfix.methods.method import count_right, edit_loss, take_steps
from recipes.hotfix.methods.plain import FineTuning
from recipes.hotfix.settings import HotfixSettings

SURE = 0.9  # the probability up to which is fine-tuned, so that there is a way to go back
PLACES = 20  # networks on the line


class Interpolation(FineTuning):
    """On the line from the old network to a fine-tuned one: all right with the fewest flips on the check inputs."""

    title = "interpolation of weights"

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
        """See :class:`Method`; the account is the share of the way that was taken."""
        optimizer = torch.optim.Adam(model.parameters(), lr=choice["lr"])

        def step() -> None:
            optimizer.zero_grad()
            edit_loss(model, case).backward()
            optimizer.step()

        taken = take_steps(
            model, case, step, most=settings.max_steps, progress=progress, least=SURE
        )
        guessed = outputs(case.old, case.check, AT_ONCE).argmax(dim=1)
        ends = [[p.detach().clone() for p in network.parameters()] for network in (case.old, model)]

        def place(share: float) -> None:
            with torch.no_grad():
                for p, old, new in zip(model.parameters(), *ends, strict=True):
                    p.copy_(torch.lerp(old, new, share))

        found: list[tuple[int, int, float]] = []
        for k in range(1, PLACES + 1):
            place(k / PLACES)
            right = count_right(model, case)
            flips = 0
            # Flips are counted only where they can decide.
            if right == max([right, *(r for r, _, _ in found)]):
                flips = int((outputs(model, case.check, AT_ONCE).argmax(dim=1) != guessed).sum())
            found.append((right, -flips, k / PLACES))
        share = max(found)[2]
        place(share)
        return taken, {"share": share}
