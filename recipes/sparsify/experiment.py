"""The runs of ``recipes.sparsify``: from the dense network of each seed, every method prunes a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recipes.common import stored
from recipes.common.augment import Augment
from recipes.common.data import Task
from recipes.common.experiment import Content, Experiment, Save
from recipes.common.progress import progress_bar
from recipes.common.training import accuracy, steps_an_epoch
from recipes.sparsify import tables
from recipes.sparsify.dense import Dense, train_dense
from recipes.sparsify.methods import METHODS
from recipes.sparsify.networks import Network
from recipes.sparsify.pruning import sparsify, total_steps
from recipes.sparsify.settings import SparsifySettings

DENSE, DENSE_EARLY = "dense.safetensors", "dense-early.safetensors"


class Start(NamedTuple):
    """The dense network that all methods of a seed prune, and its test accuracy in percent."""

    dense: Dense
    accuracy: float


class SparsifyExperiment(Experiment[Start, Content]):
    """The runs of all seeds and methods on one network, and the files that they leave.

    Args:
        network: The network that is pruned.
        task: Its data, on the device of the runs.
        sparsities: The shares of zeros asked for, in increasing order.
        settings: The settings.
        methods: Names of the methods asked for.
        checkpoint: The dense network of all seeds; None if each seed trains its own.
        augment: The augmentation of the data set, which training and ``settings.augment`` may use.
        config: Everything that results depend on except the seed.
        out: The folder.
        environment: A description of this machine, stored with every result.
        progress: Whether to show progress bars.
    """

    start_files = (DENSE, DENSE_EARLY)
    start_keys = (
        "network",
        "data",
        "checkpoint",
        "checkpoint_sha256",
        "dense_epochs",
        "dense_batch_size",
        "validation",
        "autocast",
        "seed",
    )

    def __init__(
        self,
        network: Network,
        task: Task,
        sparsities: Sequence[float],
        settings: SparsifySettings,
        methods: Sequence[str],
        *,
        checkpoint: Dense | None,
        augment: Augment,
        config: Mapping[str, Any],
        out: Path,
        environment: Mapping[str, Any],
        progress: bool,
    ) -> None:
        super().__init__(out, config, methods)
        self.network, self.task, self.settings = network, task, settings
        self.sparsities, self.checkpoint, self.augment = sparsities, checkpoint, augment
        self.environment, self.progress = environment, progress

    # Files.

    def network_file(self, seed: int, method: str, sparsity: float) -> Path:
        """The file of a sparse network. All digits of the sparsity are in its name, so no two names are alike."""
        return self.folder(seed) / f"{method}-{sparsity}.safetensors"

    def path_file(self, seed: int, method: str) -> Path:
        """The file of the path that a method kept."""
        name = "path" if method == "fip" else f"{method}-path"
        return self.folder(seed) / f"{name}.safetensors"

    def tensor_files(self, seed: int, method: str) -> list[Path]:
        """See :class:`Experiment`: the sparse networks, and the path if the method keeps it."""
        files = [self.network_file(seed, method, sparsity) for sparsity in self.sparsities]
        return [*files, self.path_file(seed, method)] if METHODS[method].keeps_path else files

    def load_network(self, seed: int, method: str, sparsity: float) -> dict[str, Tensor]:
        """Loads the state dict of a sparse network.

        Raises:
            DataError: If the file is of another configuration, or cannot be read.
        """
        file = self.network_file(seed, method, sparsity)
        return stored.load_tensors(file, self.config_of(seed))

    def load_path(self, seed: int, method: str) -> tuple[Tensor, list[int]]:
        """Loads a path.

        Returns:
            The prunable weights of its networks, ``(networks, weights)``, and the indices of those networks that have
            a sparsity asked for.

        Raises:
            DataError: If the file is of another configuration, or cannot be read.
        """
        found = stored.load_tensors(self.path_file(seed, method), self.config_of(seed))
        return found["path"], found["arrived"].tolist()

    def check_start(self, seed: int) -> None:
        """See :class:`Experiment`. Files that an earlier run left are not read if the network is a checkpoint's."""
        if self.checkpoint is None:
            super().check_start(seed)

    # The runs.

    def start(self, seed: int) -> Start:
        """The dense network: the checkpoint, or one that an earlier run trained, or one that is trained now."""
        dense = self._dense(seed)
        model = dense.model.to(self.task.train_inputs.device)
        if any(isinstance(m, nn.Conv2d) for m in model.modules()):
            model = model.to(memory_format=torch.channels_last)
        inputs, labels = self.task.test_inputs, self.task.test_labels
        return Start(Dense(model, dense.early), accuracy(model, inputs, labels, batch_size=500))

    def run_method(
        self, seed: int, method: str, start: Start, partial: Content | None, save: Save
    ) -> None:
        """Prunes a copy of the dense network to each sparsity."""
        title = METHODS[method].full_title(self.settings, rewinds=start.dense.early is not None)
        steps = total_steps(method, self.task, self.sparsities, self.settings)
        with progress_bar(f"seed {seed}, {title}", steps, shown=self.progress) as show:
            outcome = sparsify(
                method,
                start.dense,
                self.task,
                self.sparsities,
                self.settings,
                augment=self.augment,
                seed=seed,
                progress=show,
            )
        config = self.config_of(seed)
        for network in outcome.networks:
            file = self.network_file(seed, method, network.sparsity)
            stored.save_tensors(file, network.state, config)
        if outcome.path:
            path = torch.stack(outcome.path)
            content = {"path": path, "arrived": torch.tensor(outcome.positions)}
            stored.save_tensors(self.path_file(seed, method), content, config)
        save(
            {
                "title": title,
                "environment": self.environment,
                "dense_accuracy": start.accuracy,
                "networks": [network.metrics() for network in outcome.networks],
            }
        )

    def result_of(self, content: Content) -> Content:
        """A result is the content of its file."""
        return content

    def on_result(self, seed: int, method: str, result: Content) -> None:
        """Prints a line."""
        print(tables.line(seed, self.sparsities, result), flush=True)

    def _dense(self, seed: int) -> Dense:
        folder, config = self.folder(seed), self.start_config_of(seed)
        file, early_file = folder / DENSE, folder / DENSE_EARLY
        if self.checkpoint is not None:
            early_file.unlink(missing_ok=True)  # it belongs to the network that is replaced
            stored.save_tensors(file, self.checkpoint.model.state_dict(), config)
            return self.checkpoint
        if file.exists() and early_file.exists():
            model = self.network.build()
            model.load_state_dict(stored.load_tensors(file, config))
            early = stored.load_tensors(early_file, config)
            device = self.task.train_inputs.device
            return Dense(model, {name: tensor.to(device) for name, tensor in early.items()})
        dense = self._train_dense(seed)
        assert dense.early is not None
        stored.save_tensors(early_file, dense.early, config)
        stored.save_tensors(file, dense.model.state_dict(), config)
        return dense

    def _train_dense(self, seed: int) -> Dense:
        epochs, batch_size = self.network.dense_epochs, self.network.dense_batch_size
        steps = epochs * steps_an_epoch(self.task, batch_size)
        with progress_bar(f"seed {seed}, dense", steps, shown=self.progress) as show:
            return train_dense(
                self.network.build,
                self.task,
                epochs=epochs,
                batch_size=batch_size,
                augment=self.augment,
                autocast=self.settings.autocast,
                seed=seed,
                progress=show,
            )
