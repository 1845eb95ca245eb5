"""Interpolation of weights (WiSE-FT): as far from the old network to the plainly trained one as a budget allows."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from torch import nn

from recipes.common.progress import Progress
from recipes.common.training import outputs
from recipes.update.case import AT_ONCE, Case
from recipes.update.methods.method import Update, percent
from recipes.update.methods.plain import PlainTraining
from recipes.update.settings import UpdateSettings

PLACES = 20  # networks on the line


class Interpolation(PlainTraining):
    """For each budget the farthest of the networks on the line that keeps it on the check inputs."""

    title = "interpolation of weights"

    def names(self, settings: UpdateSettings) -> Sequence[str]:
        """A network for each budget."""
        return [percent(budget) for budget in settings.max_flips]

    def run(
        self, case: Case, settings: UpdateSettings, *, seed: int, progress: Progress
    ) -> list[Update]:
        """See :class:`Method`; the account is the share of the way that was taken."""
        trained = self.train(case, settings, seed=seed, progress=progress)
        seen = self.steps(case, settings) * settings.batch_size
        began = time.perf_counter()
        before = outputs(case.old, case.check, AT_ONCE).argmax(dim=1)
        flips = []
        for k in range(PLACES + 1):
            now = outputs(between(case.start, trained.model, k / PLACES), case.check, AT_ONCE)
            flips.append(float((now.argmax(dim=1) != before).double().mean()))
        seconds = trained.seconds + time.perf_counter() - began
        found = []
        for budget in settings.max_flips:
            # The first network predicts what the old one does, so there always is one.
            share = max(k for k, flipped in enumerate(flips) if flipped <= budget) / PLACES
            model = between(case.start, trained.model, share)
            found.append(Update(percent(budget), model, seen, seconds, budget, {"share": share}))
        return found


@torch.no_grad()
def between(start: nn.Module, end: nn.Module, share: float) -> nn.Module:
    """The network at a share of the way between two; running statistics are interpolated, too."""
    model, target = copy.deepcopy(start), end.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(target[name], share)
    return model.eval()
