"""Training from scratch: the start network, and the members of an ensemble of independent networks."""

from __future__ import annotations

import torch
from torch import nn

from recipes.common.augment import Augment
from recipes.common.data import Task
from recipes.common.progress import Progress
from recipes.common.training import (
    adam_one_cycle,
    minibatches,
    seed_everything,
    steps_an_epoch,
    train,
)
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.source import Build


def train_network(
    build: Build,
    task: Task,
    settings: EnsembleSettings,
    *,
    augment: Augment | None,
    seed: int,
    progress: Progress = lambda steps, text: None,
) -> nn.Module:
    """Trains a network from scratch by Adam on one cycle.

    Args:
        build: Makes the network, newly initialised.
        task: The data.
        settings: The settings.
        augment: Changes the inputs of each step; None leaves them as they are.
        seed: The seed of the initialisation and of the batches.
        progress: Called after each step.

    Returns:
        The network in eval mode and in channels-last layout, which its copies have, too.
    """
    seed_everything(seed)
    model = build().to(task.train_inputs.device).to(memory_format=torch.channels_last)
    steps = training_steps(task, settings)
    batches = minibatches(task, batch_size=settings.batch_size, epochs=settings.epochs, seed=seed)
    train(
        model,
        ((augment(x), y) for x, y in batches) if augment else batches,
        *adam_one_cycle(model, lr=settings.lr, steps=steps),
        autocast=settings.autocast,
        after_step=lambda step: progress(1, "training"),
    )
    return model.eval()


def training_steps(task: Task, settings: EnsembleSettings) -> int:
    """The number of steps that :func:`train_network` takes."""
    return settings.epochs * steps_an_epoch(task, settings.batch_size)
