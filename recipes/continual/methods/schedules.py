"""How the length of a step, or a learning rate, goes over a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

# Each schedule is made for one step more than are taken, because its last step would have length 0.
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, float, int], LRScheduler]] = {
    "one-cycle": lambda optimizer, lr, steps: OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps + 1, cycle_momentum=False
    ),
    "cosine": lambda optimizer, lr, steps: CosineAnnealingLR(optimizer, T_max=steps + 1),
    "constant": lambda optimizer, lr, steps: LambdaLR(optimizer, lambda step: 1.0),
}
