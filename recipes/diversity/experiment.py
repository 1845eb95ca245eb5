"""The runs of ``recipes.diversity``: from the start network of each seed, every method makes an ensemble."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recipes.common import stored
from recipes.common.augment import augmentation
from recipes.common.checkpoints import load_weights
from recipes.common.data import DataError, Task
from recipes.common.experiment import Content, Experiment, Save
from recipes.common.progress import progress_bar
from recipes.common.training import accuracy
from recipes.diversity import tables
from recipes.diversity.attack_settings import AttackSettings, size_name
from recipes.diversity.beyond import Outside
from recipes.diversity.ensembles import (
    SECONDS_FILE,
    Ensemble,
    build_ensemble,
    check_members,
    member_file,
)
from recipes.diversity.evaluation import Evaluation
from recipes.diversity.methods import METHODS, path_names
from recipes.diversity.networks import Network
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.training import train_network, training_steps

START = "start"  # the name of the start network's record, beside those of the methods


class Start(NamedTuple):
    """The start network of a seed.

    Attributes:
        model: The start network, in eval mode.
        attacked: The images that fool it, for each size of the attack.
    """

    model: nn.Module
    attacked: dict[float, Tensor]


class DiversityExperiment(Experiment[Start, Content]):
    """The runs of all seeds and methods on one network, and the files that they leave.

    Args:
        network: The network that ensembles are made of.
        task: Its data, on the device of the runs.
        settings: The settings.
        attacks: The settings of the attacks.
        outside: Images that belong to none of the classes.
        checkpoint: The file of the start network of all seeds; None if each seed trains its own.
        config: Everything that results depend on except the seed.
        out: The folder.
        resume: Whether members of an interrupted ensemble are kept.
        progress: Whether to show progress bars.
    """

    def __init__(
        self,
        network: Network,
        task: Task,
        settings: EnsembleSettings,
        attacks: AttackSettings,
        outside: Outside,
        *,
        checkpoint: Path | None,
        config: Mapping[str, Any],
        out: Path,
        resume: bool,
        progress: bool,
    ) -> None:
        super().__init__(out, config, list(METHODS))
        self.network, self.task, self.settings, self.attacks = network, task, settings, attacks
        self.checkpoint, self.resume, self.progress = checkpoint, resume, progress
        self.augment = augmentation(task.name) if network.augment else None
        self.evaluation = Evaluation(task, attacks, outside)

    # Files.

    def start_file(self, seed: int) -> Path:
        """The file of the start network."""
        return self.folder(seed) / f"{START}.safetensors"

    def attacked_file(self, seed: int) -> Path:
        """The file of the images that fool the start network."""
        return self.folder(seed) / "attacked.safetensors"

    def ensemble_folder(self, seed: int, method: str) -> Path:
        """The folder of the members."""
        return self.folder(seed) / method

    def tensor_files(self, seed: int, method: str) -> list[Path]:
        """See :class:`Experiment`: the members."""
        folder = self.ensemble_folder(seed, method)
        return [member_file(folder, k) for k in range(self.settings.members)]

    def load_start(self, seed: int) -> nn.Module:
        """Loads the start network.

        Raises:
            DataError: If the file is of another configuration, or cannot be read.
        """
        model = self._built()
        model.load_state_dict(stored.load_tensors(self.start_file(seed), self.config_of(seed)))
        return model.eval()

    def load_attacked(self, seed: int) -> dict[float, Tensor]:
        """Loads the images that fool the start network, for each size of the attack.

        Raises:
            DataError: If the file is of another configuration, or cannot be read.
        """
        found = stored.load_tensors(self.attacked_file(seed), self.config_of(seed))
        images = self.evaluation.images
        return {eps: found[size_name(eps)].to(images) for eps in self.attacks.attack_eps}

    def clear(self, seeds: Sequence[int]) -> None:
        """See :class:`Experiment`; also removes the start network, and the lists of the members of ensembles."""
        super().clear(seeds)
        for seed in seeds:
            for name in METHODS:
                (self.ensemble_folder(seed, name) / SECONDS_FILE).unlink(missing_ok=True)
            self.result_file(seed, START).unlink(missing_ok=True)
            self.start_file(seed).unlink(missing_ok=True)
            self.attacked_file(seed).unlink(missing_ok=True)

    def check_start(self, seed: int) -> None:
        """See :class:`Experiment`; also checks members of ensembles that were interrupted."""
        config = self.config_of(seed)
        if self.finished(seed, START):
            stored.check_tensors(self.start_file(seed), config)
            if self.attacked_file(seed).exists():
                stored.check_tensors(self.attacked_file(seed), config)
        for name, method in METHODS.items():
            if method.is_resumable:
                check_members(self.ensemble_folder(seed, name), config)

    # The runs.

    def needs_run(self, seed: int, unfinished: Sequence[str]) -> bool:
        """See :class:`Experiment`; the record of the start network must be there, too."""
        return bool(unfinished) or self.finished(seed, START) is None

    def start(self, seed: int) -> Start:
        """The start network: the checkpoint, or one that an earlier run trained, or one that is trained now."""
        if self.finished(seed, START):
            model = self.load_start(seed)
        else:
            model = self._new_start(seed)
        return Start(model, self._attacked(model, seed))

    def run_method(
        self, seed: int, method: str, start: Start, partial: Content | None, save: Save
    ) -> None:
        """Makes an ensemble and measures it."""
        ensemble = self._build(method, start.model, seed)
        save(self.evaluation.measure(ensemble, start.model, start.attacked, seed))

    def result_of(self, content: Content) -> Content:
        """A result is the content of its file."""
        return content

    def on_result(self, seed: int, method: str, result: Content) -> None:
        """Prints a line."""
        print(tables.line(seed, method, result), flush=True)

    def _built(self) -> nn.Module:
        """The architecture, in the layout that convolutions on a CPU prefer; copies of the start network keep it."""
        model = self.network.build().to(self.evaluation.images.device)
        return model.to(memory_format=torch.channels_last)

    def _new_start(self, seed: int) -> nn.Module:
        seconds = 0.0
        if self.checkpoint is not None:
            model = self._built()
            load_weights(self.checkpoint, model)
            model.eval()
        else:
            steps = training_steps(self.task, self.settings)
            with progress_bar(f"seed {seed}, start", steps, shown=self.progress) as show:
                begun = time.perf_counter()
                model = train_network(
                    self.network.build,
                    self.task,
                    self.settings,
                    augment=self.augment,
                    seed=seed,
                    progress=show,
                )
                seconds = time.perf_counter() - begun
        stored.save_tensors(self.start_file(seed), model.state_dict(), self.config_of(seed))
        clean = accuracy(model, self.task.test_inputs, self.task.test_labels, batch_size=500)
        self.attacked_file(seed).unlink(missing_ok=True)
        self.save(seed, START, {"accuracy": clean, "seconds": seconds})
        return model

    def _attacked(self, start: nn.Module, seed: int) -> dict[float, Tensor]:
        """The images that fool the start network, made once; its record says its accuracy on them."""
        record = self.finished(seed, START)
        assert record is not None
        if self.attacked_file(seed).exists() and "transfer" in record:
            return self.load_attacked(seed)
        attacked = self.evaluation.transferred(start, seed)
        content = {size_name(eps): images for eps, images in attacked.items()}
        stored.save_tensors(self.attacked_file(seed), content, self.config_of(seed))
        transfer = self.evaluation.accuracies(start, attacked)
        self.save(seed, START, {**record, "transfer": transfer})
        return attacked

    def _build(self, name: str, start: nn.Module, seed: int) -> Ensemble:
        method = METHODS[name]
        distances = self._path_distances(seed) if method.needs_distances else []
        steps = method.total_steps(self.task, self.settings)
        with progress_bar(f"seed {seed}, {method.title}", steps, shown=self.progress) as show:
            return build_ensemble(
                name,
                start,
                self.network.build,
                self.task,
                self.settings,
                folder=self.ensemble_folder(seed, name),
                config=self.config_of(seed),
                augment=self.augment,
                distances=distances,
                seed=seed,
                resume=self.resume,
                progress=show,
            )

    def _path_distances(self, seed: int) -> list[float]:
        """The distances from the start network of the members of the last path that is finished.

        Raises:
            DataError: If no path is finished.
        """
        for name in reversed(path_names()):
            record = self.finished(seed, name)
            if record is not None:
                distances: list[float] = record["distances"]
                return distances
        raise DataError(
            "noise is as long as a path: run a path with it, or before it with --resume"
        )
