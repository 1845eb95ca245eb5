"""Distillation whose steps are orthogonal, by timm's Muon.

It tells what the steps of the path gain over distillation beside their geometry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LRScheduler

from fipoptim.geometry.muon import is_matrix
from recipes.common.options import RATE, fraction, or_none
from recipes.common.settings import option
from recipes.continual.methods.base import Method, Needs
from recipes.continual.methods.distillation import Distillation, DistillationOptions
from recipes.continual.methods.schedules import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class MuonOptions(DistillationOptions):
    """Muon on one cycle of the learning rate.

    Attributes:
        lr: The highest learning rate.
        momentum: Muon's momentum; None is 0.95.
    """

    lr: float = option("Muon's highest learning rate", default=3e-3, **RATE)
    momentum: float | None = option(
        "Muon's momentum; none is 0.95", default=None, type=or_none(fraction), metavar="X"
    )


class OrthogonalDistillation(Distillation):
    """The loss of distillation with Muon (Jordan et al., 2024) in place of Adam.

    Matrices that the path measures as Adam does are left to Adam here too.
    """

    options: MuonOptions

    def optimizer(self, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """Muon with Nesterov's momentum; its steps are as long as Adam's."""
        from timm.optim.muon import Muon

        options = self.options
        groups = [
            {"params": [p for p in self.model.parameters() if is_matrix(p) == orthogonal]}
            | {"use_fallback": not orthogonal}
            for orthogonal in (True, False)
        ]
        optimizer: torch.optim.Optimizer = Muon(
            [group for group in groups if group["params"]],
            lr=options.lr,
            momentum=0.95 if options.momentum is None else options.momentum,
            betas=(0.9, 0.999),
            nesterov=True,
        )
        return optimizer, SCHEDULES["one-cycle"](optimizer, options.lr, steps)


METHOD = Method(
    "distillation-muon",
    "distillation, Muon",
    OrthogonalDistillation,
    MuonOptions,
    needs=Needs("timm", "timm.optim.muon"),
)
