"""The training loop of the old network and of every update, and what it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from recipes.common.augment import Augment
from recipes.common.data import Task
from recipes.common.progress import Progress
from recipes.common.training import minibatches, synchronize, training_mode

# Gets the inputs of a step, their outputs and their labels.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Trained:
    """A network after a training.

    Attributes:
        model: The network, in eval mode.
        seconds: The seconds of the training.
    """

    model: nn.Module
    seconds: float


def learn(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    loss: Loss,
    *,
    batch_size: int,
    epochs: float,
    augment: Augment | None,
    freeze_batch_norm: bool,
    seed: int,
    progress: Progress,
) -> Trained:
    """Trains a network in place on labelled inputs.

    Args:
        model: The network.
        task: The labelled inputs.
        optimizer: Any optimizer of ``torch.optim`` over the model's parameters.
        scheduler: Stepped after each step.
        loss: The loss of a step.
        batch_size: Inputs of a step.
        epochs: Passes over the inputs; the last may be a part of one.
        augment: Changes the inputs of a step; None leaves them as they are.
        freeze_batch_norm: Whether batch norm layers normalise by their running statistics and leave these alone.
        seed: The seed of the batches and of the augmentation.
        progress: Called after each step.
    """
    torch.manual_seed(seed)
    training_mode(model, freeze_batch_norm=freeze_batch_norm)
    seconds = 0.0
    for inputs, labels in minibatches(task, batch_size=batch_size, epochs=epochs, seed=seed):
        began = time.perf_counter()
        x = inputs if augment is None else augment(inputs)
        x = x.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        found = loss(x, model(x), labels)
        found.backward()
        optimizer.step()
        scheduler.step()
        synchronize(x.device)
        seconds += time.perf_counter() - began
        progress(1, f"loss {float(found.detach()):.3g}")
    return Trained(model.eval(), seconds)
