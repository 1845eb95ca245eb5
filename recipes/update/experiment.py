"""The runs of ``recipes.update``: from the old network of each seed, every method learns all classes."""

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
from recipes.common.training import adam_one_cycle, seed_everything, steps_in_epochs
from recipes.update import tables
from recipes.update.case import Case, Parts, divide, make_case
from recipes.update.learning import Trained, learn
from recipes.update.measures import Measures
from recipes.update.methods import METHODS
from recipes.update.settings import UpdateSettings
from recipes.update.setups import Setup

OLD, PLAIN = "old.safetensors", "plain"


class Start(NamedTuple):
    """What the methods of a seed begin with, and what measures them."""

    case: Case
    measures: Measures


class UpdateExperiment(Experiment[Start, Content]):
    """The runs of all seeds and methods on one network, and the files that they leave.

    Args:
        setup: The network and its data.
        task: The data on the device of the runs.
        settings: The settings.
        config: Everything that results depend on except the seed.
        out: The folder.
        environment: A description of this machine, stored with every result.
        progress: Whether to show progress bars.
    """

    start_files = (OLD,)
    start_keys = (
        *("network", "validation", "held_out", "old_epochs", "old_lr", "batch_size"),
        "seed",
    )

    def __init__(
        self,
        setup: Setup,
        task: Task,
        settings: UpdateSettings,
        *,
        config: Mapping[str, Any],
        out: Path,
        environment: Mapping[str, Any],
        progress: bool,
    ) -> None:
        super().__init__(out, config, list(METHODS))
        self.setup, self.task, self.settings = setup, task, settings
        self.environment, self.progress = environment, progress
        self.augment = augmentation(setup.data) if setup.augment else None

    def network_file(self, seed: int, method: str, name: str) -> Path:
        """The file of a network that a method made, by its name."""
        end = f"-{name.replace(' %', '')}" if name else ""
        return self.folder(seed) / f"{method}{end}.safetensors"

    def tensor_files(self, seed: int, method: str) -> Sequence[Path]:
        """See :class:`Experiment`: the networks."""
        names = METHODS[method].names(self.settings)
        return [self.network_file(seed, method, name) for name in names]

    def start(self, seed: int) -> Start:
        """The old network, the case that is made of it, and the plainly trained network if it is there."""
        parts = divide(self.task, self.settings.held_out, seed=seed)
        case = make_case(self._old(seed, parts), parts, self.augment)
        if (plain := self.finished(seed, PLAIN)) is not None:
            file = self.network_file(seed, PLAIN, "")
            model = self._network(case.task.classes)
            model.load_state_dict(stored.load_tensors(file, self.config_of(seed)))
            case.plain.append(Trained(model.eval(), plain["networks"][0]["seconds"]))
        return Start(case, Measures(case))

    def run_method(
        self, seed: int, method: str, start: Start, partial: Content | None, save: Save
    ) -> None:
        """Updates a copy of the old network, and measures what comes of it."""
        chosen = METHODS[method]
        steps = chosen.steps(start.case, self.settings)
        with progress_bar(f"seed {seed}, {chosen.title}", steps, shown=self.progress) as show:
            updates = chosen.run(start.case, self.settings, seed=seed, progress=show)
        for update in updates:
            file = self.network_file(seed, method, update.name)
            stored.save_tensors(file, update.model.state_dict(), self.config_of(seed))
        save(
            {
                "title": chosen.title,
                "environment": self.environment,
                "networks": [start.measures.record(update) for update in updates],
            }
        )

    def result_of(self, content: Content) -> Content:
        """A result is the content of its file."""
        return content

    def on_result(self, seed: int, method: str, result: Content) -> None:
        """Prints a line for each network."""
        print(tables.lines(seed, result), flush=True)

    def _network(self, classes: int) -> nn.Module:
        model = self.setup.build(classes).to(self.task.train_inputs.device)
        return model.to(memory_format=torch.channels_last)

    def _old(self, seed: int, parts: Parts) -> nn.Module:
        """The old network in eval mode: loaded if an earlier run trained it, trained otherwise."""
        seed_everything(seed)
        model = self._network(parts.old.classes)
        file, config = self.folder(seed) / OLD, self.start_config_of(seed)
        if file.exists():
            model.load_state_dict(stored.load_tensors(file, config))
            return model.eval()
        settings = self.settings
        steps = steps_in_epochs(parts.old, settings.batch_size, settings.old_epochs)
        with progress_bar(f"seed {seed}, old network", steps, shown=self.progress) as show:
            learn(
                model,
                parts.old,
                *adam_one_cycle(model, lr=settings.old_lr, steps=steps),
                lambda x, z, labels: F.cross_entropy(z, labels),
                batch_size=settings.batch_size,
                epochs=settings.old_epochs,
                augment=self.augment,
                freeze_batch_norm=False,
                seed=seed,
                progress=show,
            )
        stored.save_tensors(file, model.state_dict(), config)
        return model.eval()
