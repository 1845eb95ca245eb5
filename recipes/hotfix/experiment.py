"""The runs of ``recipes.hotfix``: from the old network of each seed, every method fixes a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from recipes.common import stored
from recipes.common.augment import augmentation
from recipes.common.data import Task
from recipes.common.experiment import Content, Experiment, Save
from recipes.common.progress import progress_bar
from recipes.common.training import (
    adam_one_cycle,
    minibatches,
    seed_everything,
    steps_an_epoch,
    train,
)
from recipes.hotfix import tables
from recipes.hotfix.case import Case, Unseen, draw
from recipes.hotfix.measures import Measures
from recipes.hotfix.methods import METHODS
from recipes.hotfix.settings import HotfixSettings
from recipes.hotfix.setups import Setup

OLD = "old.safetensors"
BATCH_SIZE, LR = 32, 3e-3  # of the network that is trained here


class Start(NamedTuple):
    """What the methods of a seed begin with, and the inputs on which they are measured."""

    case: Case
    unseen: Unseen


class HotfixExperiment(Experiment[Start, Content]):
    """The runs of all seeds and methods on one network, and the files that they leave.

    Args:
        setup: The network that is fixed.
        task: Its data on the device of the runs; the test inputs are those that it was not trained on.
        settings: The settings.
        checkpoint: The old network of all seeds; None if each seed trains its own.
        development: Whether the inputs that are kept for results are left alone.
        config: Everything that results depend on except the seed.
        out: The folder.
        environment: A description of this machine, stored with every result.
        progress: Whether to show progress bars.
    """

    start_files = (OLD,)

    def __init__(
        self,
        setup: Setup,
        task: Task,
        settings: HotfixSettings,
        *,
        checkpoint: nn.Module | None,
        development: bool,
        config: Mapping[str, Any],
        out: Path,
        environment: Mapping[str, Any],
        progress: bool,
    ) -> None:
        super().__init__(out, config, list(METHODS))
        self.setup, self.task, self.settings = setup, task, settings
        self.checkpoint, self.development = checkpoint, development
        self.environment, self.progress = environment, progress

    def network_file(self, seed: int, method: str) -> Path:
        """The file of the network that a method made."""
        return self.folder(seed) / f"{method}.safetensors"

    def tensor_files(self, seed: int, method: str) -> Sequence[Path]:
        """See :class:`Experiment`: the network."""
        return [self.network_file(seed, method)]

    def start(self, seed: int) -> Start:
        """The old network, and the inputs that are drawn for the seed."""
        old = (self._trained(seed) if self.checkpoint is None else self.checkpoint).eval()
        old = old.to(self.task.train_inputs.device).to(memory_format=torch.channels_last)
        old.requires_grad_(False)
        stored.save_tensors(self.folder(seed) / OLD, old.state_dict(), self.config_of(seed))
        case, unseen = draw(
            old,
            self.task,
            self.settings,
            augment=augmentation(self.task.name) if self.setup.augment else None,
            development=self.development,
            seed=seed,
        )
        return Start(case, unseen)

    def run_method(
        self, seed: int, method: str, start: Start, partial: Content | None, save: Save
    ) -> None:
        """Fixes copies of the old network, chooses one on the check inputs, and measures it."""
        chosen = METHODS[method]
        most = len(chosen.choices(self.settings)) * self.settings.max_steps
        with progress_bar(f"seed {seed}, {chosen.title}", most, shown=self.progress) as show:
            trials = chosen.run(start.case, self.settings, seed=seed, progress=show)
        best, record = Measures(start.case, start.unseen).record(trials)
        state = trials[best].model.state_dict()
        stored.save_tensors(self.network_file(seed, method), state, self.config_of(seed))
        save({"title": chosen.title, "environment": self.environment, **record})

    def result_of(self, content: Content) -> Content:
        """A result is the content of its file."""
        return content

    def on_result(self, seed: int, method: str, result: Content) -> None:
        """Prints a line."""
        print(tables.line(seed, result, self.settings), flush=True)

    def _trained(self, seed: int) -> nn.Module:
        assert self.setup.epochs is not None
        seed_everything(seed)
        model = self.setup.build().to(self.task.train_inputs.device)
        steps = self.setup.epochs * steps_an_epoch(self.task, BATCH_SIZE)
        optimizer, scheduler = adam_one_cycle(model, lr=LR, steps=steps)
        batches = minibatches(self.task, batch_size=BATCH_SIZE, epochs=self.setup.epochs, seed=seed)
        with progress_bar(f"seed {seed}, old network", steps, shown=self.progress) as show:
            train(
                model,
                batches,
                optimizer,
                scheduler,
                loss=F.cross_entropy,
                after_step=lambda step: show(1, "training"),
            )
        return model
