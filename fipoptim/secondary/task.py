"""The loss of a new task, as an objective."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fipoptim.anchors.evaluation import device_of
from fipoptim.anchors.output_space import read_logits
from fipoptim.secondary.arguments import (
    LossFunction,
    checked_loss,
    checked_loss_function,
    checked_module,
)
from fipoptim.secondary.batches import EndlessBatches


class TaskLoss:
    """The loss of a new task: ``loss_fn(model(x), y)`` on the next batch of a loader.

    Batches are taken in turn, and the loader is started again when it is exhausted, so a shuffling DataLoader
    shuffles anew at each pass. The model runs in the mode it is in, as in a training loop. ``x`` is a tensor, a
    tuple of tensors (positional inputs) or a dict of tensors (keyword inputs). If the output is a dict or a
    ``ModelOutput``, its ``logits`` are taken.

    A deep copy or a pickle continues with the batch that was next. It starts the loader anew, with the random states
    that torch and the loader's own generators had when the current pass began, skips the batches that were used, and
    puts the random states back.

    Args:
        model: The network that is optimized.
        loader: A DataLoader or any iterable of ``(x, y)`` pairs that can be iterated more than once. Batches
            are moved to the model's device.
        loss_fn: Takes the output and ``y`` and returns a scalar.

    Raises:
        TypeError: If an argument has the wrong type. When called, if the loader yields something that is not a pair.
        ValueError: When called, if the loader yields nothing, or if the loss is not a scalar.
    """

    def __init__(
        self, model: nn.Module, loader: Iterable[Any], loss_fn: LossFunction = F.cross_entropy
    ) -> None:
        self.model = checked_module("model", model)
        self.loss_fn = checked_loss_function(loss_fn)
        self._endless_batches = EndlessBatches("loader", loader)

    def __call__(self) -> Tensor:
        """The loss on the next batch, a scalar with a graph to the model's parameters."""
        x, y = self._endless_batches.next_pair(device_of(self.model))
        if isinstance(x, dict):
            output = self.model(**x)
        elif isinstance(x, tuple):
            output = self.model(*x)
        else:
            output = self.model(x)
        return checked_loss(self.loss_fn(read_logits(output), y))
