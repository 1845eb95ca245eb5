"""Training and testing: one loop that takes any optimizer, Adam on one cycle, accuracy and scores."""

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
    """The number of batches that ``minibatches`` yields for one epoch."""
    return max(1, len(task.train_inputs) // batch_size)


def steps_in_epochs(task: Task, batch_size: int, epochs: float) -> int:
    """The number of batches that ``minibatches`` yields for ``epochs`` epochs; the last may be a part of one."""
    return max(1, round(epochs * steps_an_epoch(task, batch_size)))


def minibatches(
    task: Task, *, batch_size: int, epochs: float, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled training batches of ``batch_size``; inputs that do not fill a batch are left out for that epoch."""
    generator = torch.Generator().manual_seed(seed)
    device = task.train_inputs.device
    steps, whole = steps_in_epochs(task, batch_size, epochs), steps_an_epoch(task, batch_size)
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
    """Trains a network in place. The loop is the same for Adam and for ``fipoptim.FIPOptimizer``.

    Args:
        model: Trained in place.
        batches: Inputs and labels of each step.
        optimizer: Any ``torch.optim.Optimizer`` over the model's parameters.
        scheduler: Stepped after each step.
        loss: The loss of outputs and labels.
        freeze_batch_norm: Whether batch norm layers keep their running statistics and normalise by them.
        autocast: Whether the model runs in bfloat16; its outputs are converted to float32.
        after_step: Called with the number of steps taken; it must leave the model as it is. Its time is not counted.

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
    """Adam whose learning rate rises to ``lr`` and then falls to 0 within ``steps`` steps.

    ``momentum`` is Adam's first beta. If it is None, it falls from 0.95 to 0.85 while the learning rate rises, and
    rises again while the learning rate falls.
    """
    cycled = momentum is None
    betas = (0.9 if momentum is None else momentum, 0.999)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=betas)
    return optimizer, OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1, cycle_momentum=cycled)


def training_mode(model: nn.Module, *, freeze_batch_norm: bool) -> None:
    """Sets train mode; batch norm layers stay in eval mode if they are frozen."""
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
        classes: The first class to choose among and the one after the last (task-aware); None is all classes.
        batch_size: Inputs at a time.
    """
    first, end = classes or (0, None)
    z = outputs(model, inputs, batch_size)[:, first:end]
    return 100.0 * float((z.argmax(dim=1) + first == labels).double().mean())


def scores(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The probability ``(n,)`` of each input's label among all classes, in eval mode."""
    p = outputs(model, inputs, len(inputs)).softmax(dim=1)
    return p.gather(1, labels[:, None])[:, 0]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor, batch_size: int = 100) -> Tensor:
    """Outputs ``(n, m)`` in eval mode, ``batch_size`` inputs at a time; the mode of ``model`` is left as it is."""
    # Modes are restored one by one, because train(True) would also set frozen batch norm layers to train mode.
    training = [module for module in model.modules() if module.training]
    model.eval()
    z = torch.cat([model(x) for x in inputs.split(batch_size)])
    for module in training:
        module.training = True
    return z


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done its work, so that a clock measures the work and not its queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
