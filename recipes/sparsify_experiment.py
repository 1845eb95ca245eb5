"""The runs of ``recipes.sparsify``: dense networks made sparse by each method, each kept when it is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fipoptim.secondary import SparseProjection
from recipes import report, sparse_export, sparsify_figures, sparsify_tables
from recipes.augment import Augment
from recipes.data import Task
from recipes.progress import progress_bar
from recipes.pruning import Dense, Settings, sparsify, total_steps
from recipes.sparsify_networks import Network, load_dense, train_dense
from recipes.training import accuracy, steps_an_epoch

RECIPE = "sparsify"


class Experiment:
    """The runs of all seeds and methods on one network, and the files that they leave."""

    def __init__(
        self,
        network: Network,
        task: Task,
        sparsities: Sequence[float],
        settings: Settings,
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
        return self.folder(seed) / f"{method}-{sparsity:g}.safetensors"

    def finished(self, seed: int, method: str) -> dict[str, Any] | None:
        """The record of a finished run."""
        return report.read_json(self._record(seed, method))

    def _record(self, seed: int, method: str) -> Path:
        return self.folder(seed) / f"{method}.json"

    def check_resumable(self, seeds: Sequence[int], methods: Sequence[str]) -> None:
        """Refuses finished runs of another configuration.

        Raises:
            DataError: With the differences.
        """
        for seed in seeds:
            for method in methods:
                if record := self.finished(seed, method):
                    report.refuse_another(self._record(seed, method), record["config"], self.config)

    def run(
        self,
        seed: int,
        methods: Sequence[str],
        checkpoint: Dense | None,
        *,
        resume: bool,
        progress: bool,
    ) -> None:
        """All methods of one seed, from one dense network."""
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
            with progress_bar(f"seed {seed}, {method}", steps, shown=progress) as show:
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
            for network in done.networks:
                report.save_tensors(self.file(seed, method, network.wanted), network.state)
            if done.path:
                path = self.folder(seed) / "path.safetensors"
                report.save_tensors(path, {"path": torch.stack(done.path)})
            record = {
                "config": self.config,
                "environment": self.environment,
                "dense_accuracy": dense_accuracy,
                "networks": [network.metrics() for network in done.networks],
            }
            report.write_json(self._record(seed, method), record)
            print(sparsify_tables.line(seed, method, dense_accuracy, done.networks), flush=True)

    def _dense(self, seed: int, checkpoint: Dense | None, *, progress: bool, resume: bool) -> Dense:
        """The dense network: the checkpoint's, one that an earlier run has trained, or one trained now."""
        device = self.task.train_inputs.device
        file, early = (self.folder(seed) / f"{n}.safetensors" for n in ("dense", "dense-early"))
        if checkpoint is not None:
            dense = checkpoint
            report.save_tensors(file, dense.model.state_dict())
        elif resume and file.exists() and early.exists():
            dense = load_dense(file, self.network.build())
            dense = Dense(dense.model, {k: t.to(device) for k, t in load_file(early).items()})
        else:
            epoch = steps_an_epoch(self.task, self.network.dense_batch_size)
            total = self.network.dense_epochs * epoch
            with progress_bar(f"seed {seed}, dense", total, shown=progress) as show:
                dense = train_dense(
                    self.network,
                    self.task,
                    augment=self.augment,
                    autocast=self.settings.autocast,
                    seed=seed,
                    progress=show,
                )
            assert dense.early is not None
            report.save_tensors(early, dense.early)
            report.save_tensors(file, dense.model.state_dict())
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
        print(f"\n{sparsify_tables.table(records, self.sparsities)}")
        report.write_results(
            self.out / "results.json",
            recipe=RECIPE,
            config={**self.config, "seeds": list(seeds)},
            environment=_of_the_runs(records),
            metrics=sparsify_tables.metrics(records),
        )
        sparsify_figures.accuracies(self.out / "accuracy.png", records)
        names = SparseProjection(self.network.build(), 0.0, keep=self.settings.keep).names
        if "fip" in methods:
            sparsest = [load_file(self.file(s, "fip", self.sparsities[-1])) for s in seeds]
            sparsify_figures.layers(self.out / "layers.png", sparsest, names)
            first = self.folder(seeds[0])
            sparsify_figures.weight_space(
                self.out / "weights.png",
                load_file(first / "path.safetensors")["path"],
                stages=len(self.sparsities),
                seed=seeds[0],
            )
        if export:
            for method in methods:
                for sparsity in self.sparsities:
                    source = self.file(seeds[0], method, sparsity)
                    sizes = sparse_export.export(
                        load_file(source),
                        names,
                        self.out / "export" / source.stem,
                    )
                    print(f"exported {self.out / 'export' / source.stem}: {sizes}")
        print(f"results.json, the networks and the plots are in {self.out}")


def _of_the_runs(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What the finished runs ran on, which may be another machine than this one; by method where they differ."""
    found = {
        method: [run["environment"] for run in runs] for method, runs in records.items() if runs
    }
    everything = [environment for runs in found.values() for environment in runs]
    alike = all(environment == everything[0] for environment in everything)
    return everything[0] if alike else found
