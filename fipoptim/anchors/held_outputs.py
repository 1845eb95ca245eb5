"""Anchors on which only some outputs are held: those of a task, or those that were known when it was learnt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recipes.common.augment import Augment

OutputRange = tuple[int, int]  # the first output that is held, and the one after the last


class HeldOutputs(nn.Module):
    """A network that sets outputs to 0 if they are not to be held.

    An ``AnchorBatch`` of it holds the other outputs: an output that is always 0 does not drift.

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


def with_ranges(inputs: Tensor, held: OutputRange) -> tuple[Tensor, Tensor]:
    """Pairs ``inputs`` ``(n, ...)`` with one range for all of them, ``(n, 2)``, as :class:`HeldOutputs` takes them."""
    return inputs, torch.tensor(held, device=inputs.device).repeat(len(inputs), 1)


def augmented(augment: Augment) -> Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Makes an augmentation of inputs into one of inputs with ranges.

    ``augment`` may return several views of each input: first one view of all inputs, then the next.
    """

    def augment_both(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, held = pair
        views = augment(inputs)
        return views, held.repeat(len(views) // len(inputs), 1)

    return augment_both
