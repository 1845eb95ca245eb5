"""The networks that ``recipes.sparsify`` prunes, with the defaults for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from recipes.common.networks import digits_mlp, lenet_300_100, resnet20
from recipes.sparsify.methods.baseline import BaselineOptions
from recipes.sparsify.methods.path import PathOptions
from recipes.sparsify.settings import SparsifySettings


@dataclass(frozen=True)
class Network:
    """A network that can be pruned here.

    Attributes:
        build: Makes the network, newly initialised.
        data: Names of the data sets that it takes; the first is the default.
        sparsities: The shares of zeros that are visited by default, in increasing order.
        dense_epochs: Passes over the training set in which the dense network is trained.
        dense_batch_size: Inputs of a step of that training.
        settings: The default settings.
    """

    build: Callable[[], nn.Module]
    data: tuple[str, ...]
    sparsities: tuple[float, ...]
    dense_epochs: int
    dense_batch_size: int
    settings: SparsifySettings


NETWORKS = {
    "digits-mlp": Network(
        digits_mlp,
        data=("digits",),
        sparsities=(0.9, 0.95, 0.98),
        dense_epochs=60,
        dense_batch_size=32,
        settings=SparsifySettings(
            batch_size=128,
            method_options=(
                PathOptions(epochs=60, eps=0.5),
                BaselineOptions(baseline_epochs=450, baseline_lr=5e-3),
            ),
        ),
    ),
    "lenet-300-100": Network(
        lenet_300_100,
        data=("mnist", "fashion-mnist"),
        sparsities=(0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.985, 0.989, 0.991, 0.994),
        dense_epochs=15,
        dense_batch_size=128,
        settings=SparsifySettings(
            batch_size=128,
            mask_every=40,
            method_options=(
                PathOptions(epochs=4, eps=0.3, probes=8, metric_batch=500, metric_decay=0.9),
                BaselineOptions(baseline_epochs=8, baseline_lr=3e-3),
            ),
        ),
    ),
    "resnet20": Network(
        resnet20,
        data=("cifar10",),
        sparsities=(0.93, 0.95),
        dense_epochs=40,
        dense_batch_size=128,
        settings=SparsifySettings(
            batch_size=64,
            mask_every=40,
            augment="labels",
            method_options=(
                PathOptions(epochs=10, eps=0.3, probes=2),
                BaselineOptions(baseline_epochs=10, baseline_lr=4e-3),
            ),
        ),
    ),
}
