"""The dense networks that ``recipes.sparsify`` starts from: built, trained or loaded, with the defaults for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from recipes.common.augment import Augment
from recipes.common.checkpoints import load_weights
from recipes.common.data import Task
from recipes.common.networks import digits_mlp, lenet_300_100, resnet20
from recipes.common.progress import Progress
from recipes.common.training import adam_one_cycle, minibatches, seed_everything, steps_an_epoch
from recipes.sparsify.pruning import Dense, Settings

EARLY = 0.05  # of the dense network's training: where the lottery ticket rewinds to


@dataclass(frozen=True)
class Network:
    """A network that can be sparsified here: how it is built, trained, and on what."""

    build: Callable[[], nn.Module]
    data: tuple[str, ...]
    sparsities: tuple[float, ...]
    dense_epochs: int
    dense_batch_size: int
    settings: Settings


NETWORKS = {
    "digits-mlp": Network(
        digits_mlp,
        data=("digits",),
        sparsities=(0.9, 0.95, 0.98),
        dense_epochs=60,
        dense_batch_size=32,
        settings=Settings(
            epochs=60,
            batch_size=128,
            lr=2e-3,
            baseline_epochs=450,
            baseline_lr=5e-3,
            products="adaptive",
            eps=1.5,
        ),
    ),
    "lenet-300-100": Network(
        lenet_300_100,
        data=("mnist", "fashion-mnist"),
        sparsities=(0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.985, 0.989, 0.991, 0.994),
        dense_epochs=15,
        dense_batch_size=128,
        settings=Settings(
            epochs=5,
            batch_size=128,
            lr=2e-3,
            baseline_epochs=8,
            baseline_lr=3e-3,
            mask_every=40,
            probes=8,
            metric_batch=500,
            metric_decay=0.9,
        ),
    ),
    "resnet20": Network(
        resnet20,
        data=("cifar10",),
        sparsities=(0.93, 0.95),
        dense_epochs=40,
        dense_batch_size=128,
        settings=Settings(
            epochs=10,
            batch_size=64,
            lr=1e-3,
            baseline_epochs=10,
            baseline_lr=4e-3,
            mask_every=40,
            probes=2,
            augment="labels",
            autocast=True,
        ),
    ),
}


def train_dense(
    network: Network,
    task: Task,
    *,
    augment: Augment | None,
    autocast: bool,
    seed: int,
    progress: Progress = lambda steps, text: None,
) -> Dense:
    """Trains the start network on labels.

    Networks with batch norm by SGD with Nesterov momentum, weight decay and augmentation, others by Adam; both on one
    cycle.
    """
    seed_everything(seed)
    model = network.build().to(task.train_inputs.device)
    batch_size, epochs = network.dense_batch_size, network.dense_epochs
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
    """A start network from a file; see :func:`recipes.common.checkpoints.load_weights`."""
    load_weights(path, model)
    return Dense(model, None)
