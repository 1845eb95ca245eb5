"""ResNet-20 on CIFAR-10, from a file. What is new to it are the training images that it gets wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recipes.common import stored
from recipes.common.checkpoints import load_weights
from recipes.common.data import DataError, load_task
from recipes.common.networks import resnet20
from recipes.common.progress import Progress
from recipes.common.training import outputs, seed_everything
from recipes.spectrum.measurements.layers import LayersOptions
from recipes.spectrum.measurements.path import PathOptions
from recipes.spectrum.networks.network import Given, Network
from recipes.spectrum.networks.two_tasks import drawn
from recipes.spectrum.settings import SpectrumSettings
from recipes.spectrum.start import Loss, NewTask, cross_entropy

LOOKED_THROUGH = 2000  # training images among which wrong ones are looked for
MOST_WRONG = 100
BATCH_SIZE = 50


class ResNet20(Network):
    """ResNet-20 that was trained on CIFAR-10."""

    settings = SpectrumSettings(
        anchors=32,
        probes=2,
        steps=16,
        top=20,
        method_options=(
            PathOptions(path_steps=8, path_networks=2, path_beta=0.3, path_eps=0.03),
            LayersOptions(layer_probes=1, layer_steps=8),
        ),
    )
    needs_checkpoint = True
    training_steps = 1

    def __init__(self, given: Given, settings: SpectrumSettings) -> None:
        assert given.checkpoint is not None
        self._file, self._anchors = given.checkpoint, settings.anchors
        load_weights(given.checkpoint, resnet20())  # refuses another file before data is read
        task = load_task("cifar10", data_root=given.data_root, download=given.download)
        self._task = task.to(given.device)
        if settings.anchors > len(task.train_inputs):
            raise DataError(
                f"argument --anchors: {settings.anchors} is more than the {len(task.train_inputs)} training images"
            )

    @property
    def identity(self) -> Mapping[str, Any]:
        """See :class:`Network`."""
        return stored.identity(self._file)

    def build(self, seed: int) -> nn.Module:
        """See :class:`Network`."""
        seed_everything(seed)
        model = resnet20().to(self._task.train_inputs.device)
        return model.to(memory_format=torch.channels_last).eval()

    def train(self, model: nn.Module, seed: int, progress: Progress) -> None:
        """See :class:`Network`: the weights of the file."""
        load_weights(self._file, model)
        progress(1, "read")

    def anchors(self, seed: int) -> Tensor:
        """See :class:`Network`: training images."""
        return drawn(self._task.train_inputs, self._anchors, seed)[0]

    def new_task(self, model: nn.Module, seed: int) -> NewTask:
        """See :class:`Network`: training images that the network gets wrong, none of them an anchor."""
        task = self._task
        order = torch.randperm(
            len(task.train_inputs), generator=torch.Generator().manual_seed(seed)
        )
        some = order[self._anchors : self._anchors + LOOKED_THROUGH].to(task.train_inputs.device)
        inputs, labels = task.train_inputs[some], task.train_labels[some]
        wrong = (outputs(model, inputs).argmax(dim=1) != labels).nonzero().flatten()[:MOST_WRONG]
        if len(wrong) == 0:
            raise DataError(
                f"the network gets none of {len(some)} training images wrong, so there is nothing for it to learn"
            )
        inputs, labels = inputs[wrong], labels[wrong]

        def losses() -> Iterator[Loss]:
            generator = torch.Generator().manual_seed(seed)
            while True:
                rows = torch.randperm(len(inputs), generator=generator)[:BATCH_SIZE]
                yield cross_entropy(inputs[rows], labels[rows])

        return NewTask(f"{len(wrong)} wrong images", cross_entropy(inputs, labels), losses)
