"""Anchors of which some outputs alone are held: those that a task has, or that were known when it was learnt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recipes.common.augment import Augment

Held = tuple[int, int]  # the first output that is held and the one after the last


class HeldOutputs(nn.Module):
    """A network whose outputs are 0 where they are not to be held, whatever its weights are.

    An ``AnchorBatch`` of it then holds what is left: what is 0 now and later has not moved.

    Args:
        model: Gives outputs ``(n, m)``; shared, not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, held: Tensor) -> Tensor:
        """Outputs ``(n, m)`` of ``inputs`` ``(n, ...)``; ``held`` ``(n, 2)`` has a range for each input."""
        z: Tensor = self.model(inputs)
        column = torch.arange(z.shape[1], device=z.device)
        return z.masked_fill((column < held[:, :1]) | (column >= held[:, 1:]), 0.0)


def with_ranges(inputs: Tensor, held: Held) -> tuple[Tensor, Tensor]:
    """``inputs`` with the same range for each of them, as :class:`HeldOutputs` takes them."""
    return inputs, torch.tensor(held, device=inputs.device).repeat(len(inputs), 1)


def augmented(augment: Augment) -> Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """``augment`` for inputs with ranges, where it may make several of each, one round of all after the other."""

    def both(given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, held = given
        made = augment(inputs)
        return made, held.repeat(len(made) // len(inputs), 1)

    return both
