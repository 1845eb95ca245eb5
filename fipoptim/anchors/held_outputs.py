"""Anchors on which only some outputs are held: those of a task, or those that were known when it was learnt."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OutputRange = tuple[int, int]  # the first output that is held, and the one after the last


class HeldOutputs(nn.Module):
    """A network that replaces outputs by one number if they are not to be held.

    An ``AnchorBatch`` of it holds the other outputs: an output that is always the same does not drift.

    Args:
        model: Gives outputs ``(n, m)``; shared, not copied.
        width: The number of outputs to give, at least ``m``, for a head that grows; None gives those of the model.
        fill: The number. One that is smaller than every output leaves the prediction to the held ones.

    Raises:
        ValueError: If the model has more than ``width`` outputs.
    """

    def __init__(self, model: nn.Module, width: int | None = None, fill: float = 0.0) -> None:
        super().__init__()
        self.model, self.width, self.fill = model, width, fill

    def forward(self, inputs: Tensor, held: Tensor) -> Tensor:
        """Outputs ``(n, m)``, or ``(n, width)``, of ``inputs`` ``(n, ...)``.

        ``held`` says which are held of each input: a range in whole numbers ``(n, 2)``, or one bool an output.
        """
        z: Tensor = self.model(inputs)
        if self.width is not None:
            if z.shape[1] > self.width:
                raise ValueError(f"width: the model has {z.shape[1]} outputs, got {self.width}.")
            z = F.pad(z, (0, self.width - z.shape[1]))
        if held.dtype != torch.bool:
            column = torch.arange(z.shape[1], device=z.device)
            held = (column >= held[:, :1]) & (column < held[:, 1:])
        return z.masked_fill(~held, self.fill)


def with_ranges(inputs: Tensor, held: OutputRange) -> tuple[Tensor, Tensor]:
    """Pairs ``inputs`` ``(n, ...)`` with one range for all of them, ``(n, 2)``, as :class:`HeldOutputs` takes them."""
    return inputs, torch.tensor(held, device=inputs.device).repeat(len(inputs), 1)


def augmented(
    augment: Callable[[Tensor], Tensor],
) -> Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Makes an augmentation of inputs into one of inputs with what is held of each.

    ``augment`` may return several views of each input: first one view of all inputs, then the next.
    """

    def augment_both(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, held = pair
        views = augment(inputs)
        return views, held.repeat(len(views) // len(inputs), 1)

    return augment_both
