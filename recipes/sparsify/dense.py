"""The dense network that pruning starts from: trained here, or loaded from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from recipes.common.augment import Augment
from recipes.common.checkpoints import load_weights
from recipes.common.data import Task
from recipes.common.progress import Progress
from recipes.common.training import adam_one_cycle, minibatches, seed_everything, steps_an_epoch

EARLY = (
    0.05  # the share of the training after which the weights are remembered for the lottery ticket
)


@dataclass(frozen=True)
class Dense:
    """A dense network.

    Attributes:
        model: The trained network.
        early: Its weights and buffers early in training; None if they are unknown.
    """

    model: nn.Module
    early: dict[str, Tensor] | None


def train_dense(
    build: Callable[[], nn.Module],
    task: Task,
    *,
    epochs: int,
    batch_size: int,
    augment: Augment | None,
    autocast: bool,
    seed: int,
    progress: Progress = lambda steps, text: None,
) -> Dense:
    """Trains a dense network on labels, on one cycle of the learning rate.

    Networks with batch norm are trained by SGD with Nesterov momentum, weight decay and augmentation, others by Adam
    without augmentation.

    Args:
        build: Makes the network, newly initialised.
        task: The data.
        epochs: Passes over the training set.
        batch_size: Inputs of a step.
        augment: Changes the inputs of a step; None leaves them as they are.
        autocast: Whether the network runs in bfloat16.
        seed: The seed of the initialisation and of the batches.
        progress: Called after each step.

    Returns:
        The network in train mode, on the device of the data.
    """
    seed_everything(seed)
    model = build().to(task.train_inputs.device)
    steps = epochs * steps_an_epoch(task, batch_size)
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.4, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        scheduler = OneCycleLR(optimizer, max_lr=0.4, total_steps=steps + 1, cycle_momentum=False)
    else:
        augment = None
        optimizer, scheduler = adam_one_cycle(model, lr=3e-3, steps=steps)
    early = {}
    model.train()
    batches = minibatches(task, batch_size=batch_size, epochs=epochs, seed=seed)
    for step, (x, y) in enumerate(batches):
        if step == round(EARLY * steps):
            early = {name: t.clone() for name, t in model.state_dict().items()}
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(augment(x) if augment else x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress(1, "dense network")
    return Dense(model, early)


def load_dense(path: Path, model: nn.Module) -> Dense:
    """Loads a dense network from a file into ``model``; see :func:`recipes.common.checkpoints.load_weights`."""
    load_weights(path, model)
    return Dense(model, None)
