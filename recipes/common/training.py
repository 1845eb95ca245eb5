"""Training and testing as everyone does it: one loop that takes any optimizer, Adam on one cycle, accuracy."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from recipes.common.data import Task


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def steps_an_epoch(task: Task, batch_size: int) -> int:
    """How many batches ``minibatches`` yields for one epoch."""
    return max(1, len(task.train_inputs) // batch_size)


def steps_of(task: Task, batch_size: int, epochs: float) -> int:
    """How many batches ``minibatches`` yields for that many epochs, of which the last may be a part."""
    return max(1, round(epochs * steps_an_epoch(task, batch_size)))


def minibatches(
    task: Task, *, batch_size: int, epochs: float, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled training batches of ``batch_size``; what does not fill a batch sits that epoch out."""
    generator = torch.Generator().manual_seed(seed)
    device = task.train_inputs.device
    steps, whole = steps_of(task, batch_size, epochs), steps_an_epoch(task, batch_size)
    for done in range(0, steps, whole):
        order = torch.randperm(len(task.train_inputs), generator=generator).to(device)
        for k in range(min(whole, steps - done)):
            chosen = order[k * batch_size : (k + 1) * batch_size]
            yield task.train_inputs[chosen], task.train_labels[chosen]


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    freeze_batch_norm: bool = False,
    autocast: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> float:
    """Trains, the same lines for Adam and for ``fipoptim.FIPOptimizer``.

    Args:
        model: Trained in place.
        batches: Inputs and labels of each step.
        optimizer: Any ``torch.optim.Optimizer`` over the model's parameters.
        scheduler: Stepped after each step.
        loss: Of outputs and labels.
        freeze_batch_norm: Whether batch norm layers keep their running statistics and normalise by them.
        autocast: Whether the model runs in bfloat16; its outputs are taken back to float32.
        after_step: Called with the number of steps taken, to leave the model as it is; its time is not counted.

    Returns:
        Seconds spent training.
    """
    seconds = 0.0
    training_mode(model, freeze_batch_norm=freeze_batch_norm)
    for step, (inputs, labels) in enumerate(batches, start=1):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=autocast):
            outputs = model(inputs)
        loss(outputs.float() if autocast else outputs, labels).backward()
        optimizer.step()
        scheduler.step()
        synchronize(inputs.device)
        seconds += time.perf_counter() - start
        if after_step is not None:
            after_step(step)
    return seconds


def adam_one_cycle(
    model: nn.Module, *, lr: float, steps: int, momentum: float | None = None
) -> tuple[torch.optim.Adam, OneCycleLR]:
    """Adam whose learning rate rises to ``lr`` and falls to nothing in ``steps`` steps.

    ``momentum`` is its first beta; None lets it fall from 0.95 to 0.85 and rise again, against the learning rate.
    """
    cycled = momentum is None
    betas = (0.9 if momentum is None else momentum, 0.999)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=betas)
    return optimizer, OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1, cycle_momentum=cycled)


def training_mode(model: nn.Module, *, freeze_batch_norm: bool) -> None:
    """Train mode, in which batch norm layers may stay in eval mode."""
    model.train()
    if freeze_batch_norm:
        for layer in batch_norms(model):
            layer.eval()


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norm layers of a network, of any dimension."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def accuracy(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    classes: tuple[int, int] | None = None,
    batch_size: int = 100,
) -> float:
    """Percent of ``inputs`` whose largest output is their label, in eval mode.

    Args:
        model: Its mode is left as it is.
        inputs: ``(n, ...)``.
        labels: ``(n,)``.
        classes: The first class to choose among and the one after the last (task-aware); None is the whole head.
        batch_size: Inputs at a time.
    """
    first, end = classes or (0, None)
    z = outputs(model, inputs, batch_size)[:, first:end]
    return 100.0 * float((z.argmax(dim=1) + first == labels).double().mean())


def scores(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The probability ``(n,)`` of each input's own label over the whole head, in eval mode."""
    p = outputs(model, inputs, len(inputs)).softmax(dim=1)
    return p.gather(1, labels[:, None])[:, 0]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor, batch_size: int = 100) -> Tensor:
    """Outputs ``(n, m)`` in eval mode, ``batch_size`` inputs at a time; the mode of ``model`` is left as it is."""
    # Module by module: train(True) would wake the batch norm layers that are frozen.
    training = [module for module in model.modules() if module.training]
    model.eval()
    z = torch.cat([model(x) for x in inputs.split(batch_size)])
    for module in training:
        module.training = True
    return z


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that seconds are those of the work and not of its queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
