"""Images in two tasks: a network is trained on the first, and the second is new to it. Digits, and the paper's CNN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recipes.common.data import DATASETS, DataError, load_pair
from recipes.common.networks import network_for
from recipes.common.progress import Progress
from recipes.common.training import (
    adam_one_cycle,
    minibatches,
    seed_everything,
    steps_in_epochs,
    train,
)
from recipes.spectrum.measurements.layers import LayersOptions
from recipes.spectrum.measurements.path import PathOptions
from recipes.spectrum.networks.network import Given, Network
from recipes.spectrum.settings import SpectrumSettings
from recipes.spectrum.start import Loss, NewTask, cross_entropy

NEW_INPUTS = 500  # of the new task, whose gradient is looked at


class TwoTasks(Network):
    """A network for two tasks on one head. The base of two networks.

    Attributes:
        tasks: The names of the data sets.
        epochs: Passes over the first task.
        batch_size: Inputs of a step.
    """

    tasks: ClassVar[tuple[str, str]]
    epochs: ClassVar[float]
    batch_size: ClassVar[int]

    def __init__(self, given: Given, settings: SpectrumSettings) -> None:
        first, second = load_pair(*self.tasks, data_root=given.data_root, download=given.download)
        self.first, self.second = first.to(given.device), second.to(given.device)
        if settings.anchors > len(first.train_inputs):
            raise DataError(
                f"argument --anchors: {settings.anchors} is more than the {len(first.train_inputs)} training inputs "
                f"of {first.name}"
            )
        self._anchors = settings.anchors

    @property
    def identity(self) -> Mapping[str, Any]:
        """See :class:`Network`."""
        return {"tasks": list(self.tasks), "epochs": self.epochs, "batch_size": self.batch_size}

    def build(self, seed: int) -> nn.Module:
        """See :class:`Network`."""
        seed_everything(seed)
        model = network_for(
            DATASETS[self.first.name].family, self.first.classes + self.second.classes
        )
        return model.to(self.first.train_inputs.device).eval()

    @property
    def training_steps(self) -> int:
        """See :class:`Network`."""
        return steps_in_epochs(self.first, self.batch_size, self.epochs)

    def train(self, model: nn.Module, seed: int, progress: Progress) -> None:
        """See :class:`Network`: Adam on one cycle."""
        optimizer, scheduler = adam_one_cycle(model, lr=3e-3, steps=self.training_steps)
        batches = minibatches(self.first, batch_size=self.batch_size, epochs=self.epochs, seed=seed)
        title = self.first.name
        train(model, batches, optimizer, scheduler, after_step=lambda _: progress(1, title))

    def anchors(self, seed: int) -> Tensor:
        """See :class:`Network`: training inputs of the first task."""
        return drawn(self.first.train_inputs, self._anchors, seed)[0]

    def new_task(self, model: nn.Module, seed: int) -> NewTask:
        """See :class:`Network`: the second task."""
        inputs, labels = drawn(self.second.train_inputs, NEW_INPUTS, seed, self.second.train_labels)

        def losses() -> Iterator[Loss]:
            for x, y in minibatches(
                self.second, batch_size=self.batch_size, epochs=1000, seed=seed
            ):
                yield cross_entropy(x, y)

        return NewTask(self.second.name, cross_entropy(inputs, labels), losses)


def drawn(inputs: Tensor, count: int, seed: int, labels: Tensor | None = None) -> list[Tensor]:
    """Some of the inputs, as many as there are at most, and their labels if these are given."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    chosen = order[:count].to(inputs.device)
    return [t[chosen] for t in (inputs, labels) if t is not None]


class Digits(TwoTasks):
    """The digits 0 to 4, then 5 to 9: a small network that needs no download."""

    settings = SpectrumSettings(
        anchors=200,
        leading=20,
        top=100,
        probes=8,
        method_options=(PathOptions(path_beta=1.0), LayersOptions()),
    )
    tasks, epochs, batch_size = ("digits-low", "digits-high"), 20, 32


class CNN(TwoTasks):
    """The paper's network: MNIST, then Fashion-MNIST."""

    settings = SpectrumSettings(
        anchors=50,
        probes=2,
        steps=24,
        top=30,
        method_options=(
            PathOptions(path_steps=10, path_networks=2, path_beta=60.0, path_eps=0.5),
            LayersOptions(layer_probes=1, layer_steps=12),
        ),
    )
    tasks, epochs, batch_size = ("mnist", "fashion-mnist"), 1, 100
