"""EWC, GEM and LwF as Avalanche has them, fed with our batches, schedule and tests."""

from __future__ import annotations

import copy
import itertools
import sys
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
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
from avalanche.training.utils import ParamData
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from recipes.common.training import adam_one_cycle, batch_norms, synchronize, training_mode
from recipes.continual.known_outputs import Held
from recipes.continual.learners import Batches, Learner, bytes_of

LEAST = 10  # remembered inputs of each task in a constraint of GEM


class _Course(SupervisedPlugin):
    """The batches, the schedule and the tests of one task, in Avalanche's loop."""

    def __init__(
        self,
        batches: Batches,
        steps: int,
        lr: float,
        momentum: float | None,
        after_step: Callable[[int], None] | None,
    ) -> None:
        super().__init__()
        self.batches, self.steps, self.lr, self.momentum = batches, steps, lr, momentum
        self.after_step = after_step or (lambda step: None)
        self.step = 0
        self.tested = 0.0

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        strategy.optimizer, self.scheduler = adam_one_cycle(
            strategy.model, lr=self.lr, steps=self.steps, momentum=self.momentum
        )
        strategy.dataloader = ((x, y, torch.zeros_like(y)) for x, y in self.batches)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.scheduler.step()
        self.step += 1
        synchronize(strategy.mb_x.device)
        start = time.perf_counter()
        self.after_step(self.step)
        self.tested += time.perf_counter() - start


class _FrozenBatchNorm(nn.Module):
    """A network whose batch norm layers stay in eval mode, whoever calls ``train()``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.model(x)
        return z

    def train(self, mode: bool = True) -> _FrozenBatchNorm:
        super().train(mode)
        if mode:
            training_mode(self.model, freeze_batch_norm=True)
        return self


class _Remembers:
    """Before a plugin: an experience ends for it when its task is remembered, not when its training is over."""

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.train_epochs == 0:
            super().after_training_exp(strategy, **kwargs)  # type: ignore[misc]


class _FromAvalanche(Learner):
    """A plugin of Avalanche around plain training by Adam.

    The remembered inputs are all that the plugin is shown of an earlier task: an experience of no epochs, at the end of
    which it computes or keeps what it needs.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        model = _FrozenBatchNorm(self.model) if self.freeze_batch_norm else self.model
        self.seconds = 0.0  # spent on remembering; counted with the next task
        self.holding = self.plugin()
        self.strategy = SupervisedTemplate(
            model=model,
            optimizer=torch.optim.Adam(model.parameters()),  # the course makes its own
            criterion=self.loss,
            train_mb_size=self.memory_batch,
            device=next(self.model.parameters()).device,
            plugins=[self.holding],
            evaluator=EvaluationPlugin(loggers=[BaseLogger()]),  # without a logger it warns
        )

    @property
    def memory_batch(self) -> int:
        """Remembered inputs at a time, where the plugin goes through them at the end of a task."""
        return 100

    @abstractmethod
    def plugin(self) -> SupervisedPlugin:
        """What holds the earlier tasks."""

    def remember(self, inputs: Tensor, labels: Tensor, held: Held | None = None) -> None:
        """Shows the plugin these inputs as the task that has just been learnt."""
        start = time.perf_counter()
        self.strategy.train_epochs = 0
        self.strategy.train(_experience(inputs, labels), eval_streams=[])
        self.seconds += time.perf_counter() - start

    def state(self) -> Any:
        """What the plugin holds of the tasks, how many it has seen, and the time spent on that."""
        return {
            "held": self.held(),
            "tasks": self.strategy.clock.train_exp_counter,
            "seconds": self.seconds,
            "generator": self.generator.get_state(),
        }

    def load(self, state: Any) -> None:
        """See :class:`Learner`."""
        self.hold(state["held"])
        self.strategy.clock.train_exp_counter = state["tasks"]
        self.seconds = state["seconds"]
        self.generator.set_state(state["generator"])

    @abstractmethod
    def held(self) -> Any:
        """What the plugin holds, as tensors and plain values: a checkpoint has no objects of Avalanche's."""

    @abstractmethod
    def hold(self, held: Any) -> None:
        """Gives the plugin what :meth:`held` gave."""

    def learn(
        self,
        batches: Batches,
        *,
        steps: int,
        after_step: Callable[[int], None] | None = None,
        record: tuple[int, Path] | None = None,
    ) -> float:
        """See :class:`Learner`."""
        first = next(batches)
        course = _Course(
            itertools.chain([first], batches), steps, self.lr, self.momentum, after_step
        )
        start = time.perf_counter()
        self.strategy.train_epochs = 1
        self.strategy.plugins.insert(0, course)
        try:
            self.strategy.train(_experience(*first), eval_streams=[])  # the course has its batches
        finally:
            self.strategy.plugins.remove(course)
        self.strategy.clock.train_exp_counter -= 1  # the experience goes on until it is remembered
        seconds = time.perf_counter() - start - course.tested + self.seconds
        self.seconds = 0.0
        return seconds


class _EWCPlugin(_Remembers, EWCPlugin):
    pass


class _GEMPlugin(_Remembers, GEMPlugin):
    """Its constraints may be taken on a draw from each task's memory, where all of it would take too long.

    Args:
        drawn: Inputs of each step, of all earlier tasks together but no fewer than ``LEAST`` of each; None is all.
        generator: Of the draws.
        options: Avalanche's.
    """

    def __init__(self, drawn: int | None, generator: torch.Generator, **options: Any) -> None:
        super().__init__(**options)
        self.drawn, self.generator = drawn, generator

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if self.drawn is None or not self.memory_x:
            super().before_training_iteration(strategy, **kwargs)
            return
        names = ("memory_x", "memory_y", "memory_tid")
        whole = {name: getattr(self, name) for name in names}
        each = max(LEAST, self.drawn // len(self.memory_x))
        chosen = {
            task: torch.randperm(len(x), generator=self.generator)[:each]
            for task, x in self.memory_x.items()
        }
        try:
            for name, memory in whole.items():
                setattr(self, name, {task: kept[chosen[task]] for task, kept in memory.items()})
            super().before_training_iteration(strategy, **kwargs)
        finally:
            for name, memory in whole.items():
                setattr(self, name, memory)


class _LwFPlugin(_Remembers, LwFPlugin):
    pass


class EWC(_FromAvalanche):
    """Elastic weight consolidation (Kirkpatrick et al., 2017), one penalty for each earlier task."""

    @property
    def memory_batch(self) -> int:
        """1, as squared gradients are those of single inputs; where batch norm goes by the batch, there must be one."""
        return 50 if batch_norms(self.model) and not self.freeze_batch_norm else 1

    def plugin(self) -> SupervisedPlugin:
        """Its importances are taken on the remembered inputs, with their labels."""
        return _EWCPlugin(ewc_lambda=self.strength)

    def held(self) -> Any:
        """The weights after each task and their importances, by task and name."""
        return {
            kind: {
                task: {name: data.data for name, data in by_name.items()}
                for task, by_name in getattr(self.holding, kind).items()
            }
            for kind in ("saved_params", "importances")
        }

    def hold(self, held: Any) -> None:
        """See :class:`_FromAvalanche`."""
        for kind, tasks in held.items():
            of_the_plugin = getattr(self.holding, kind)
            for task, by_name in tasks.items():
                of_the_plugin[task] = {
                    name: ParamData(name, init_tensor=tensor, device=tensor.device)
                    for name, tensor in by_name.items()
                }

    def remembered_bytes(self) -> int:
        """The weights after each task and their importances."""
        kept = (self.holding.saved_params, self.holding.importances)
        return bytes_of(
            [data.data for tasks in kept for task in tasks.values() for data in task.values()]
        )


class GEM(_FromAvalanche):
    """Gradient episodic memory (Lopez-Paz and Ranzato, 2017)."""

    _MEMORY = ("memory_x", "memory_y", "memory_tid")

    def plugin(self) -> SupervisedPlugin:
        """Remembered inputs of every earlier task are in each step's constraints."""
        return _GEMPlugin(
            self.settings.anchor_batch,
            self.generator,
            patterns_per_experience=sys.maxsize,
            memory_strength=self.strength,
        )

    def held(self) -> Any:
        """The inputs, their labels and what Avalanche takes for their tasks, by task."""
        return {name: getattr(self.holding, name) for name in self._MEMORY}

    def hold(self, held: Any) -> None:
        """See :class:`_FromAvalanche`."""
        for name in self._MEMORY:
            setattr(self.holding, name, held[name])

    def remembered_bytes(self) -> int:
        """The inputs and their labels."""
        return bytes_of((self.holding.memory_x, self.holding.memory_y))


class LwF(_FromAvalanche):
    """Learning without forgetting (Li and Hoiem, 2016): distillation on the new task's inputs; it needs no memory."""

    def plugin(self) -> SupervisedPlugin:
        """Of the remembered inputs it learns which classes there were."""
        return _LwFPlugin(alpha=self.strength, temperature=2)

    def held(self) -> Any:
        """The network after the last task, and the classes that there were."""
        lwf = self.holding.lwf
        return {
            "model": None if lwf.prev_model is None else lwf.prev_model.state_dict(),
            "classes": {task: sorted(known) for task, known in lwf.prev_classes_by_task.items()},
            "tasks": lwf.expcount,
        }

    def hold(self, held: Any) -> None:
        """See :class:`_FromAvalanche`."""
        lwf = self.holding.lwf
        if held["model"] is not None:
            lwf.prev_model = copy.deepcopy(self.strategy.model)
            lwf.prev_model.load_state_dict(held["model"])
        lwf.prev_classes_by_task.update({t: set(known) for t, known in held["classes"].items()})
        lwf.expcount = held["tasks"]

    def remembered_bytes(self) -> int:
        """The network after the last task."""
        before = self.holding.lwf.prev_model
        return 0 if before is None else bytes_of(before.state_dict())


def _experience(inputs: Tensor, labels: Tensor) -> DatasetExperience[Any]:
    count = len(labels)
    attributes = [
        DataAttribute(labels.tolist(), "targets"),
        DataAttribute(ConstantSequence(0, count), "targets_task_labels", use_in_getitem=True),
    ]
    dataset = TaskAwareSupervisedClassificationDataset(
        [TensorDataset(inputs, labels)], data_attributes=attributes
    )
    return DatasetExperience(dataset=dataset)
