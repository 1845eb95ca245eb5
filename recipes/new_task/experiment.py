"""The runs of ``recipes.new_task``: one network learns task 1, then a copy for each method learns task 2."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes.common import stored
from recipes.common.data import DATASETS, DataError, Task
from recipes.common.experiment import Content, Experiment, Save
from recipes.common.networks import network_for
from recipes.common.training import seed_everything
from recipes.continual.methods import METHODS
from recipes.continual.remembered import draw_remembered
from recipes.new_task.learning import learn_first_task, learn_second_task
from recipes.new_task.outcome import Outcome
from recipes.new_task.results import report_seed
from recipes.new_task.settings import NewTaskSettings

FIRST_TASK = "first-task.safetensors"


class NewTaskExperiment(Experiment[nn.Module, Outcome]):
    """The runs of all seeds and methods on one pair of tasks, and the files that they leave.

    Args:
        task1: The task that the network learns first and is to keep.
        task2: The task that it learns then.
        settings: How both are learnt.
        config: Everything that results depend on except the seed.
        out: The folder.
        device: The device on which the networks are trained.
        seed_folders: Whether each seed has a folder of its own in ``out``.
        keep_networks: Whether the networks along the path are kept, for ``FIPPath.open``.
        progress: Whether to show progress bars.
    """

    result_suffix = ".pt"
    start_files = (FIRST_TASK,)
    start_keys = (
        "task1",
        "task2",  # its classes are on the same head
        "validation",
        "task1_epochs",
        "batch_size",
        "task1_lr",
        "seed",
    )

    def __init__(
        self,
        task1: Task,
        task2: Task,
        settings: NewTaskSettings,
        config: Mapping[str, Any],
        out: Path,
        *,
        device: torch.device,
        seed_folders: bool,
        keep_networks: bool,
        progress: bool,
    ) -> None:
        super().__init__(out, config, list(METHODS))
        self.task1, self.task2 = task1.to(device), task2.to(device)
        self.settings, self.device = settings, device
        self.seed_folders, self.keep_networks, self.progress = seed_folders, keep_networks, progress

    def folder(self, seed: int) -> Path:
        """See :class:`Experiment`; a single seed has no folder of its own."""
        return super().folder(seed) if self.seed_folders else self.out

    def networks(self, seed: int) -> Path:
        """The folder of the networks along the path."""
        return self.folder(seed) / "networks"

    def networks_record(self, seed: int) -> Path:
        """The file that says which configuration those networks are of."""
        return self.folder(seed) / "networks.json"

    def start(self, seed: int) -> nn.Module:
        """The network after task 1: loaded if an earlier run trained it, trained otherwise."""
        seed_everything(seed)
        classes = self.task1.classes + self.task2.classes
        model = network_for(DATASETS[self.task1.name].family, classes).to(self.device)
        file, config = self.folder(seed) / FIRST_TASK, self.start_config_of(seed)
        if file.exists():
            model.load_state_dict(stored.load_tensors(file, config))
        else:
            learn_first_task(model, self.task1, self.settings, seed=seed, progress=self.progress)
            stored.save_tensors(file, model.state_dict(), config)
        return model

    def run_method(
        self, seed: int, method: str, start: nn.Module, partial: Content | None, save: Save
    ) -> None:
        """Teaches task 2 to a copy of the network."""
        seed_everything(seed)  # whatever ran before this method
        networks = None
        if self.keep_networks and method == "fip":
            networks = self.networks(seed)
            if networks.exists():
                shutil.rmtree(networks)  # an interrupted run left it: check() refuses any other
            stored.save_record(self.networks_record(seed), {}, self.config_of(seed))
        outcome = learn_second_task(
            method,
            copy.deepcopy(start),
            self.task1,
            self.task2,
            draw_remembered(self.task1, self.settings.anchors, seed),
            self.settings,
            seed=seed,
            progress=self.progress,
            networks=networks,
        )
        save(outcome.state())

    def result_of(self, content: Content) -> Outcome:
        """See :class:`Experiment`."""
        return Outcome.of(content)

    def on_seed(self, seed: int, methods: Sequence[str]) -> None:
        """Prints, draws and writes the results of a seed."""
        outcomes = {name: found[0] for name, found in self.results([seed], methods).items()}
        report_seed(
            self.folder(seed),
            outcomes,
            seed=seed,
            tasks=(self.task1.name, self.task2.name),
            config={**self.config, "methods": list(methods), "seed": seed},
            device=self.device,
        )

    def clear(self, seeds: Sequence[int]) -> None:
        """Removes what a resumed run would take over.

        Raises:
            DataError: If networks are to be kept and some are there already; then nothing is removed.
        """
        for seed in seeds:
            if self.keep_networks and self.networks(seed).exists():
                raise DataError(
                    f"argument --keep-networks: {self.networks(seed)} is there already; "
                    "remove it or choose another --out"
                )
        super().clear(seeds)

    def check(self, seeds: Sequence[int]) -> None:
        """See :class:`Experiment`; also refuses networks along a path that is not this run's."""
        super().check(seeds)
        for seed in seeds if self.keep_networks else ():
            record = stored.load_record(self.networks_record(seed), self.config_of(seed))
            if record is None and self.networks(seed).exists():
                raise DataError(
                    f"--keep-networks: {self.networks(seed)} is not of this run; remove it or choose another --out"
                )
            if record is None and self.result_file(seed, "fip").exists():
                raise DataError(
                    "--keep-networks: the path was finished without keeping its networks; remove "
                    f"{self.result_file(seed, 'fip')} to walk it again"
                )
