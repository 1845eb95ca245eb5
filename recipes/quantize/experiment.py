"""The runs of ``recipes.quantize``: from the dense network of each seed, every method quantizes a copy to all bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipoptim.secondary import OnGrid
from recipes.common import stored
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
from recipes.quantize import tables
from recipes.quantize.inputs import draw_images
from recipes.quantize.measures import Measures
from recipes.quantize.methods import METHODS
from recipes.quantize.methods.method import Case
from recipes.quantize.networks import Network
from recipes.quantize.settings import QuantizeSettings

DENSE = "dense.safetensors"
_INTEGERS, _SCALES = ".integers", ".scales"


class Start(NamedTuple):
    """The dense network of a seed, the images that all methods are given, and the measures of what they make."""

    dense: nn.Module
    images: Tensor
    measures: Measures


class QuantizeExperiment(Experiment[Start, Content]):
    """The runs of all seeds and methods on one network, and the files that they leave.

    A method is saved after each number of bits, and a resumed run goes on with the next.

    Args:
        network: The network that is quantized.
        task: Its data, on the device of the runs.
        settings: The settings.
        checkpoint: The dense network of all seeds; None if each seed trains its own.
        config: Everything that results depend on except the seed.
        out: The folder.
        environment: A description of this machine, stored with every result.
        progress: Whether to show progress bars.
    """

    start_files = (DENSE,)
    start_keys = (
        *("network", "data", "checkpoint", "checkpoint_sha256"),
        *("dense_epochs", "validation", "seed"),
    )

    def __init__(
        self,
        network: Network,
        task: Task,
        settings: QuantizeSettings,
        *,
        checkpoint: nn.Module | None,
        config: Mapping[str, Any],
        out: Path,
        environment: Mapping[str, Any],
        progress: bool,
    ) -> None:
        super().__init__(out, config, list(METHODS))
        self.network, self.task, self.settings = network, task, settings
        self.checkpoint, self.environment, self.progress = checkpoint, environment, progress

    # Files.

    def network_file(self, seed: int, method: str, bits: int) -> Path:
        """The file of a quantized network: float weights, and integers and scales beside them."""
        return self.folder(seed) / f"{method}-{bits}.safetensors"

    def tensor_files(self, seed: int, method: str) -> Sequence[Path]:
        """See :class:`Experiment`: the networks."""
        return [self.network_file(seed, method, bits) for bits in self.settings.bits]

    def load_network(
        self, seed: int, method: str, bits: int
    ) -> tuple[dict[str, Tensor], dict[str, OnGrid]]:
        """Loads the state dict of a quantized network, and its integers and scales.

        Raises:
            DataError: If the file is of another configuration, or cannot be read.
        """
        state = stored.load_tensors(self.network_file(seed, method, bits), self.config_of(seed))
        names = [key.removesuffix(_INTEGERS) for key in state if key.endswith(_INTEGERS)]
        grids = {n: OnGrid(state.pop(n + _INTEGERS), state.pop(n + _SCALES)) for n in names}
        return state, grids

    def check_start(self, seed: int) -> None:
        """See :class:`Experiment`. Files that an earlier run left are not read if the network is a checkpoint's."""
        if self.checkpoint is None:
            super().check_start(seed)

    # The runs.

    def start(self, seed: int) -> Start:
        """The dense network: the checkpoint, or one that an earlier run trained, or one that is trained now."""
        dense = self._dense(seed).eval().to(self.task.train_inputs.device)
        dense = dense.to(memory_format=torch.channels_last).requires_grad_(False)
        return Start(dense, draw_images(self.task, self.settings, seed), Measures(dense, self.task))

    def run_method(
        self, seed: int, method: str, start: Start, partial: Content | None, save: Save
    ) -> None:
        """Quantizes a copy of the dense network to each number of bits."""
        chosen, config = METHODS[method], self.config_of(seed)
        networks = list(partial["networks"]) if partial is not None else []
        for bits in self.settings.bits[len(networks) :]:
            case = Case(start.dense, start.images, bits, seed)
            title = f"seed {seed}, {chosen.title}, {bits} bits"
            total = chosen.steps(self.settings, case)
            with progress_bar(title, total, shown=self.progress) as show:
                found = chosen.run(case, self.settings, progress=show)
            state = dict(found.model.state_dict())
            for name, grid in found.grids.items():
                state |= {name + _INTEGERS: grid.integers, name + _SCALES: grid.scales}
            stored.save_tensors(self.network_file(seed, method, bits), state, config)
            figures = start.measures.of(found.model, found.grids, bits)
            networks.append({**figures, "seconds": found.seconds})
            save(
                {
                    "title": chosen.title,
                    "environment": self.environment,
                    "dense_accuracy": start.measures.dense_accuracy,
                    "networks": networks,
                }
            )

    def is_finished(self, content: Content) -> bool:
        """See :class:`Experiment`: whether all bits are there."""
        return len(content["networks"]) == len(self.settings.bits)

    def result_of(self, content: Content) -> Content:
        """A result is the content of its file."""
        return content

    def on_result(self, seed: int, method: str, result: Content) -> None:
        """Prints a line."""
        print(tables.line(seed, result), flush=True)

    def _dense(self, seed: int) -> nn.Module:
        file, config = self.folder(seed) / DENSE, self.start_config_of(seed)
        if self.checkpoint is not None:
            stored.save_tensors(file, self.checkpoint.state_dict(), config)
            return self.checkpoint
        if file.exists():
            model = self.network.build()
            model.load_state_dict(stored.load_tensors(file, config))
            return model
        model = self._trained(seed)
        stored.save_tensors(file, model.state_dict(), config)
        return model

    def _trained(self, seed: int) -> nn.Module:
        epochs, batch_size = self.network.epochs, self.network.dense_batch_size
        assert epochs is not None
        seed_everything(seed)
        model = self.network.build().to(self.task.train_inputs.device)
        steps = epochs * steps_an_epoch(self.task, batch_size)
        optimizer, scheduler = adam_one_cycle(model, lr=3e-3, steps=steps)
        batches = minibatches(self.task, batch_size=batch_size, epochs=epochs, seed=seed)
        with progress_bar(f"seed {seed}, dense network", steps, shown=self.progress) as show:
            train(
                model,
                batches,
                optimizer,
                scheduler,
                loss=F.cross_entropy,
                after_step=lambda step: show(1, "training"),
            )
        return model
