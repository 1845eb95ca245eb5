"""Avalanche's training loop, fed with the batches, the schedule and the tests of the recipes. It imports Avalanche."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience
from avalanche.benchmarks.utils import ConstantSequence, DataAttribute
from avalanche.benchmarks.utils.classification_dataset import (
    TaskAwareSupervisedClassificationDataset,
)
from avalanche.logging import BaseLogger
from avalanche.training.plugins import (
    EvaluationPlugin,
    EWCPlugin,
    GEMPlugin,
    LwFPlugin,
    SupervisedPlugin,
)
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from recipes.common.training import adam_one_cycle, synchronize, training_mode
from recipes.continual.methods.base import Batches, Loss

FEWEST = 10  # remembered inputs of each task in a constraint of GEM


def strategy(
    model: nn.Module,
    plugin: SupervisedPlugin,
    *,
    loss: Loss,
    batch_size: int,
    freeze_batch_norm: bool,
) -> SupervisedTemplate:
    """Avalanche's plain training of a network with one plugin."""
    model_to_train = FrozenBatchNorm(model) if freeze_batch_norm else model
    return SupervisedTemplate(
        model=model_to_train,
        optimizer=torch.optim.Adam(model_to_train.parameters()),  # the course makes its own
        criterion=loss,
        train_mb_size=batch_size,
        device=next(model.parameters()).device,
        plugins=[plugin],
        evaluator=EvaluationPlugin(loggers=[BaseLogger()]),  # without a logger it warns
    )


def experience(inputs: Tensor, labels: Tensor) -> DatasetExperience[Any]:
    """Inputs ``(n, ...)`` and labels ``(n,)`` as an experience of Avalanche's."""
    attributes = [
        DataAttribute(labels.tolist(), "targets"),
        DataAttribute(ConstantSequence(0, len(labels)), "targets_task_labels", use_in_getitem=True),
    ]
    dataset = TaskAwareSupervisedClassificationDataset(
        [TensorDataset(inputs, labels)], data_attributes=attributes
    )
    return DatasetExperience(dataset=dataset)


class Course(SupervisedPlugin):
    """The batches, the schedule and the tests of one task.

    Args:
        batches: Inputs and labels of each step.
        steps: How many there are.
        lr: Adam's highest learning rate.
        momentum: Adam's first beta; None lets it cycle.
        after_step: Called with the number of steps taken.

    Attributes:
        seconds_testing: What ``after_step`` took.
    """

    def __init__(
        self,
        batches: Batches,
        steps: int,
        *,
        lr: float,
        momentum: float | None,
        after_step: Callable[[int], None] | None,
    ) -> None:
        super().__init__()
        self.batches, self.steps, self.lr, self.momentum = batches, steps, lr, momentum
        self.after_step = after_step or (lambda step: None)
        self.step = 0
        self.seconds_testing = 0.0

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Gives the loop its optimizer and its batches."""
        strategy.optimizer, self.scheduler = adam_one_cycle(
            strategy.model, lr=self.lr, steps=self.steps, momentum=self.momentum
        )
        strategy.dataloader = ((x, y, torch.zeros_like(y)) for x, y in self.batches)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Steps the schedule and tests the network."""
        self.scheduler.step()
        self.step += 1
        synchronize(strategy.mb_x.device)
        start = time.perf_counter()
        self.after_step(self.step)
        self.seconds_testing += time.perf_counter() - start


class FrozenBatchNorm(nn.Module):
    """A network whose batch norm layers stay in eval mode when Avalanche calls ``train()``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The network's outputs."""
        z: Tensor = self.model(x)
        return z

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Sets the mode of all layers except batch norm."""
        super().train(mode)
        if mode:
            training_mode(self.model, freeze_batch_norm=True)
        return self


class _EndsWhenRemembered:
    """Makes a plugin end an experience when its inputs are remembered, and not when the training is over."""

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.train_epochs == 0:
            super().after_training_exp(strategy, **kwargs)  # type: ignore[misc]


class RememberingEWC(_EndsWhenRemembered, EWCPlugin):
    """EWC whose importances are taken on the remembered inputs, with their labels."""


class RememberingLwF(_EndsWhenRemembered, LwFPlugin):
    """LwF that keeps the network as it is when inputs are remembered."""


class RememberingGEM(_EndsWhenRemembered, GEMPlugin):
    """GEM whose constraints may be taken on a draw from each task's memory, if all of it would take too long.

    Args:
        drawn: Inputs of each step, of all earlier tasks together but no fewer than ``FEWEST`` of each; None is all.
        generator: The generator of the draws.
        options: Avalanche's options.
    """

    def __init__(self, drawn: int | None, generator: torch.Generator, **options: Any) -> None:
        super().__init__(**options)
        self.drawn, self.generator = drawn, generator

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Computes the gradients of the constraints, on a draw in place of the whole memory."""
        if self.drawn is None or not self.memory_x:
            super().before_training_iteration(strategy, **kwargs)
            return
        names = ("memory_x", "memory_y", "memory_tid")
        whole = {name: getattr(self, name) for name in names}
        each = max(FEWEST, self.drawn // len(self.memory_x))
        chosen = {
            task: torch.randperm(len(x), generator=self.generator)[:each]
            for task, x in self.memory_x.items()
        }
        try:
            for name, memory in whole.items():
                setattr(self, name, {task: t[chosen[task]] for task, t in memory.items()})
            super().before_training_iteration(strategy, **kwargs)
        finally:
            for name, memory in whole.items():
                setattr(self, name, memory)
