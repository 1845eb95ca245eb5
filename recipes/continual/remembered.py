"""The few training inputs of a task that methods may keep when the task has been learnt."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.common.data import Task


def draw_remembered(task: Task, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws the training inputs of a task that are remembered, without replacement.

    Returns:
        Inputs ``(count, ...)`` and their labels ``(count,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(task.train_inputs), generator=generator)[:count]
    chosen = chosen.to(task.train_inputs.device)
    return task.train_inputs[chosen], task.train_labels[chosen]
