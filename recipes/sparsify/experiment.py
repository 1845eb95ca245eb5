"""The runs of ``recipes.sparsify``: dense networks made sparse by each method, each kept when it is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fipoptim.secondary import SparseProjection
from recipes.common import kept, report
from recipes.common.augment import Augment
from recipes.common.data import Task
from recipes.common.progress import progress_bar
from recipes.common.training import accuracy, steps_an_epoch
from recipes.sparsify import figures, tables
from recipes.sparsify.dense import Dense, train_dense
from recipes.sparsify.export import export as export_network
from recipes.sparsify.methods import METHODS
from recipes.sparsify.networks import Network
from recipes.sparsify.pruning import sparsify, total_steps
from recipes.sparsify.settings import SparsifySettings

RECIPE = "sparsify"
# What a dense network depends on: of the configuration, and the seed. It serves any run that agrees in these.
OF_THE_DENSE = (
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


class SparsifyExperiment:
    """The runs of all seeds and methods on one network, and the files that they leave.

    Args:
        network: What is made sparse.
        task: Its data.
        sparsities: Increasing.
        settings: How.
        augment: See ``recipes.sparsify.pruning.sparsify``.
        config: All that results depend on but the seed, stored with every file.
        out: The folder.
        environment: What this machine is.
    """

    def __init__(
        self,
        network: Network,
        task: Task,
        sparsities: Sequence[float],
        settings: SparsifySettings,
        augment: Augment,
        config: Mapping[str, Any],
        out: Path,
        environment: Mapping[str, Any],
    ) -> None:
        self.network, self.task, self.settings = network, task, settings
        self.sparsities, self.augment, self.config = sparsities, augment, config
        self.out, self.environment = out, environment

    def folder(self, seed: int) -> Path:
        """Where a seed's networks and records are."""
        return self.out / f"seed-{seed}"

    def file(self, seed: int, method: str, sparsity: float) -> Path:
        """Where a sparse network is."""
        return self.folder(seed) / f"{method}-{sparsity}.safetensors"  # all digits: no two alike

    def config_of(self, seed: int) -> dict[str, Any]:
        """What a run depends on."""
        return {**self.config, "seed": seed}

    def config_of_dense(self, seed: int) -> dict[str, Any]:
        """What a dense network depends on."""
        return {key: self.config_of(seed)[key] for key in OF_THE_DENSE}

    def finished(self, seed: int, method: str) -> dict[str, Any] | None:
        """The record of a finished run.

        Raises:
            DataError: If it is of another configuration, or cannot be read.
        """
        return kept.load_record(self._record(seed, method), self.config_of(seed))

    def network_of(self, seed: int, method: str, sparsity: float) -> dict[str, Tensor]:
        """The weights that a finished run arrived at.

        Raises:
            DataError: If they are of another configuration, or cannot be read.
        """
        return kept.load_tensors(self.file(seed, method, sparsity), self.config_of(seed))

    def _record(self, seed: int, method: str) -> Path:
        return self.folder(seed) / f"{method}.json"

    def _path(self, seed: int) -> Path:
        return self.folder(seed) / "path.safetensors"

    def _dense_files(self, seed: int) -> tuple[Path, Path]:
        """Where the dense network is, and its weights early in training."""
        folder = self.folder(seed)
        return folder / "dense.safetensors", folder / "dense-early.safetensors"

    def clear(self, seeds: Sequence[int], methods: Sequence[str]) -> None:
        """Removes what a resumed run would take for this run's."""
        for seed in seeds:
            for file in (*(self._record(seed, m) for m in methods), *self._dense_files(seed)):
                file.unlink(missing_ok=True)

    def check_resumable(self, seeds: Sequence[int], methods: Sequence[str]) -> None:
        """Refuses what another configuration left.

        Raises:
            DataError: With the differences.
        """
        for seed in seeds:
            for method in methods:
                if self.finished(seed, method) is None:
                    continue
                for sparsity in self.sparsities:
                    kept.check_tensors(self.file(seed, method, sparsity), self.config_of(seed))
                if method == "fip":
                    kept.check_tensors(self._path(seed), self.config_of(seed))
            for file in self._dense_files(seed):
                if file.exists() and self.config["checkpoint"] is None:
                    kept.check_tensors(file, self.config_of_dense(seed))

    def run(
        self,
        seed: int,
        methods: Sequence[str],
        checkpoint: Dense | None,
        *,
        resume: bool,
        progress: bool,
    ) -> None:
        """All methods of one seed, from one dense network.

        Raises:
            DataError: If a file of another configuration is in the way.
            FloatingPointError: If a method's weights are no longer finite.
        """
        self.folder(seed).mkdir(parents=True, exist_ok=True)
        wanted = [m for m in methods if not (resume and self.finished(seed, m))]
        if not wanted:
            return
        dense = self._dense(seed, checkpoint, progress=progress, resume=resume)
        dense_accuracy = accuracy(
            dense.model, self.task.test_inputs, self.task.test_labels, batch_size=500
        )
        for method in wanted:
            steps = total_steps(method, self.task, self.sparsities, self.settings)
            name = METHODS[method].full_title(self.settings, rewinds=dense.early is not None)
            with progress_bar(f"seed {seed}, {name}", steps, shown=progress) as show:
                done = sparsify(
                    method,
                    dense,
                    self.task,
                    self.sparsities,
                    self.settings,
                    augment=self.augment,
                    seed=seed,
                    progress=show,
                )
            config = self.config_of(seed)
            self._record(seed, method).unlink(missing_ok=True)  # of the networks that are replaced
            for network in done.networks:
                kept.save_tensors(self.file(seed, method, network.sparsity), network.state, config)
            if done.path:
                way = {"path": torch.stack(done.path), "arrived": torch.tensor(done.positions)}
                kept.save_tensors(self._path(seed), way, config)
            record = {
                "title": name,
                "environment": self.environment,
                "dense_accuracy": dense_accuracy,
                "networks": [network.metrics() for network in done.networks],
            }
            kept.save_record(self._record(seed, method), record, config)
            print(tables.line(seed, name, dense_accuracy, done.networks), flush=True)

    def _dense(self, seed: int, checkpoint: Dense | None, *, progress: bool, resume: bool) -> Dense:
        """The dense network: the checkpoint's, one that an earlier run has trained, or one trained now."""
        device = self.task.train_inputs.device
        (file, early), config = self._dense_files(seed), self.config_of_dense(seed)
        if checkpoint is not None:
            dense = checkpoint
            early.unlink(missing_ok=True)  # of the network that is replaced
            kept.save_tensors(file, dense.model.state_dict(), config)
        elif resume and file.exists() and early.exists():
            model = self.network.build()
            model.load_state_dict(kept.load_tensors(file, config))
            first = kept.load_tensors(early, config)
            dense = Dense(model, {name: t.to(device) for name, t in first.items()})
        else:
            epoch = steps_an_epoch(self.task, self.network.dense_batch_size)
            total = self.network.dense_epochs * epoch
            with progress_bar(f"seed {seed}, dense", total, shown=progress) as show:
                dense = train_dense(
                    self.network.build,
                    self.task,
                    epochs=self.network.dense_epochs,
                    batch_size=self.network.dense_batch_size,
                    augment=self.augment,
                    autocast=self.settings.autocast,
                    seed=seed,
                    progress=show,
                )
            assert dense.early is not None
            kept.save_tensors(early, dense.early, config)
            kept.save_tensors(file, dense.model.state_dict(), config)
        model = dense.model.to(device)
        if any(isinstance(m, nn.Conv2d) for m in model.modules()):
            model = model.to(memory_format=torch.channels_last)
        return Dense(model, dense.early)

    def report(self, seeds: Sequence[int], methods: Sequence[str], *, export: bool) -> None:
        """The table, ``results.json``, the plots and the exported networks."""
        records = {
            method: [r for seed in seeds if (r := self.finished(seed, method)) is not None]
            for method in methods
        }
        print(f"\n{tables.table(records, self.sparsities)}")
        report.write_results(
            self.out / "results.json",
            recipe=RECIPE,
            config={**self.config, "seeds": list(seeds)},
            environment=_of_the_runs(records),
            metrics=tables.metrics(records),
        )
        figures.accuracies(self.out / "accuracy.png", records)
        names = SparseProjection(self.network.build(), 0.0, keep=self.settings.keep).names
        if "fip" in methods:
            sparsest = [self.network_of(s, "fip", self.sparsities[-1]) for s in seeds]
            figures.layers(self.out / "layers.png", sparsest, names)
            way = kept.load_tensors(self._path(seeds[0]), self.config_of(seeds[0]))
            figures.weight_space(
                self.out / "weights.png",
                way["path"],
                positions=way["arrived"].tolist(),
                title=records["fip"][0]["title"],
                seed=seeds[0],
            )
        if export:
            for method in methods:
                for sparsity in self.sparsities:
                    folder = self.out / "export" / f"{method}-{sparsity}"
                    state = self.network_of(seeds[0], method, sparsity)
                    print(f"exported {folder}: {export_network(state, names, folder)}")
        print(f"results.json, the networks and the plots are in {self.out}")


def _of_the_runs(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What the finished runs ran on, which may be another machine than this one; by method where they differ."""
    found = {
        method: [run["environment"] for run in runs] for method, runs in records.items() if runs
    }
    everything = [environment for runs in found.values() for environment in runs]
    alike = all(environment == everything[0] for environment in everything)
    return everything[0] if alike else found
