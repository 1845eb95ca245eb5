"""Distillation whose steps are orthogonal, by timm's Muon: what the path's geometry is worth without the path."""

from __future__ import annotations

import torch
from timm.optim.muon import Muon
from torch.optim.lr_scheduler import LRScheduler

from fipoptim.geometry import is_matrix
from recipes.continual.learners import SCHEDULES, Distillation


class OrthogonalDistillation(Distillation):
    """The same loss with Muon (Jordan et al., 2024) in place of Adam, timm's.

    It tells what the steps of the path gain over distillation beside their geometry. Matrices that the path measures as
    Adam does are left to Adam here too.
    """

    def optimizer(self, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """Muon with Nesterov's momentum, as long as Adam's steps, on one cycle."""
        groups = [
            {"params": [p for p in self.model.parameters() if is_matrix(p) == orthogonal]}
            | {"use_fallback": not orthogonal}
            for orthogonal in (True, False)
        ]
        optimizer: torch.optim.Optimizer = Muon(
            [group for group in groups if group["params"]],
            lr=self.lr,
            momentum=0.95 if self.momentum is None else self.momentum,
            betas=(0.9, 0.999),
            nesterov=True,
        )
        return optimizer, SCHEDULES["one-cycle"](optimizer, self.lr, steps)
