"""The runs of ``recipes.split_tasks``: one network learns the first task, then a copy for each method all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from recipes.common import stored
from recipes.common.augment import augmentation, many
from recipes.common.data import Task
from recipes.common.experiment import Content, Experiment, Save
from recipes.common.networks import digits_mlp, narrow_resnet18, xavier
from recipes.common.progress import progress_bar
from recipes.common.training import (
    adam_one_cycle,
    minibatches,
    seed_everything,
    steps_an_epoch,
    train,
)
from recipes.continual.methods import METHODS
from recipes.split_tasks.sequence import Record, learn_sequence, within
from recipes.split_tasks.settings import SplitTasksSettings

FIRST_TASK = "first-task.safetensors"


def network(data: str, classes: int) -> nn.Module:
    """The network for a data set: the paper's narrow ResNet-18 for photographs.

    Its channels are last: on a CPU it takes 0.7 times as long for batches of 50 (one core).
    """
    if data == "digits":
        return digits_mlp(classes)
    return xavier(narrow_resnet18(classes)).to(memory_format=torch.channels_last)


class SplitTasksExperiment(Experiment[nn.Module, Record]):
    """The runs of all seeds and methods on one sequence of tasks, and the files that they leave.

    Args:
        data: The name of the data set that was split.
        tasks: The tasks, in the order in which they are learnt.
        settings: How they are learnt.
        config: Everything that results depend on except the seed.
        out: The folder.
        progress: Whether to show progress bars.
    """

    result_suffix = ".pt"
    start_files = (FIRST_TASK,)
    start_keys = (
        "data",
        "classes",
        "tasks",  # all of them are on one head
        "validation",
        "first_epochs",
        "batch_size",
        "first_lr",
        "loss_over",
        "shift",
        "seed",
    )

    def __init__(
        self,
        data: str,
        tasks: Sequence[Task],
        settings: SplitTasksSettings,
        config: Mapping[str, Any],
        out: Path,
        *,
        progress: bool,
    ) -> None:
        super().__init__(out, config, list(METHODS))
        self.data, self.tasks, self.settings, self.progress = data, tasks, settings, progress
        self.device = tasks[0].train_inputs.device
        self.loss = within(tasks[0].classes) if settings.loss_over == "task" else F.cross_entropy
        self.shift = augmentation(data) if settings.shift else None

    def start(self, seed: int) -> nn.Module:
        """The network after the first task: loaded if an earlier run trained it, trained otherwise."""
        model = self._network(seed)
        file, config = self.folder(seed) / FIRST_TASK, self.start_config_of(seed)
        if file.exists():
            model.load_state_dict(stored.load_tensors(file, config))
        else:
            self._learn_first_task(model, seed)
            stored.save_tensors(file, model.state_dict(), config)
        return model

    def run_method(
        self, seed: int, method: str, start: nn.Module, partial: Content | None, save: Save
    ) -> None:
        """Learns the other tasks in turn, and saves after every task."""
        model = self._network(seed)  # anew, so that every method finds the same random state
        model.load_state_dict(start.state_dict())
        settings, epochs = self.settings, self.settings.epochs_of(method)
        steps = sum(epochs * steps_an_epoch(t, settings.batch_size) for t in self.tasks[1:])
        with progress_bar(f"seed {seed}, {method}", steps, shown=self.progress) as show:
            learn_sequence(
                method,
                model,
                self.tasks,
                settings,
                epochs=epochs,
                batch_size=settings.batch_size,
                loss=self.loss,
                shift=self.shift,
                augment=many(self.data, settings.views) if settings.augment else None,
                seed=seed,
                partial=partial,
                save=save,
                progress=show,
            )

    def is_finished(self, content: Content) -> bool:
        """Whether all tasks have been learnt."""
        return len(content["record"]["within_task"]) == len(self.tasks)

    def result_of(self, content: Content) -> Record:
        """See :class:`Experiment`."""
        return Record(**content["record"])

    def on_result(self, seed: int, method: str, result: Record) -> None:
        """Prints a line."""
        found = result.metrics()
        print(
            f"seed {seed}, {method}: {found['within_task']:.2f} within tasks, "
            f"{found['all_classes']:.2f} among all classes, {found['seconds']:.0f} s",
            flush=True,
        )

    def _network(self, seed: int) -> nn.Module:
        seed_everything(seed)
        return network(self.data, self.tasks[-1].class_range[1]).to(self.device)

    def _learn_first_task(self, model: nn.Module, seed: int) -> None:
        task, settings, shift = self.tasks[0], self.settings, self.shift
        steps = settings.first_epochs * steps_an_epoch(task, settings.batch_size)
        batches = minibatches(
            task, batch_size=settings.batch_size, epochs=settings.first_epochs, seed=seed
        )
        with progress_bar(f"seed {seed}, first task", steps, shown=self.progress) as show:
            train(
                model,
                ((shift(x), y) for x, y in batches) if shift else batches,
                *adam_one_cycle(model, lr=settings.first_lr, steps=steps),
                loss=self.loss,
                after_step=lambda step: show(1, ""),
            )
