"""The networks that ``recipes.quantize`` quantizes, with the defaults for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from recipes.common.networks import digits_mlp, lenet_300_100, resnet20
from recipes.quantize.methods.distillation import DistillationOptions
from recipes.quantize.methods.path import PathOptions
from recipes.quantize.settings import QuantizeSettings


@dataclass(frozen=True)
class Network:
    """A network that can be quantized here.

    Attributes:
        build: Makes the network, newly initialised.
        data: Names of the data sets that it takes; the first is the default.
        epochs: Passes over the training set in which it is trained here; None if it comes from a checkpoint.
        dense_batch_size: Inputs of a step of that training.
        settings: The default settings.
    """

    build: Callable[[], nn.Module]
    data: tuple[str, ...]
    epochs: int | None
    dense_batch_size: int
    settings: QuantizeSettings


NETWORKS = {
    "digits-mlp": Network(
        digits_mlp,
        data=("digits",),
        epochs=60,
        dense_batch_size=32,
        settings=QuantizeSettings(
            method_options=(
                PathOptions(start="nearest", hold=("2", "4")),
                DistillationOptions(),
            ),
        ),
    ),
    "lenet-300-100": Network(
        lenet_300_100,
        data=("mnist", "fashion-mnist"),
        epochs=15,
        dense_batch_size=128,
        settings=QuantizeSettings(
            views=4,
            method_options=(
                PathOptions(start="nearest", hold=("2", "4")),
                DistillationOptions(),
            ),
        ),
    ),
    "resnet20": Network(
        resnet20,
        data=("cifar10",),
        epochs=None,
        dense_batch_size=128,
        settings=QuantizeSettings(
            views=2,
            method_options=(
                PathOptions(steps=100, hold=("layer1", "layer2", "layer3")),
                DistillationOptions(distillation_steps=170),
            ),
        ),
    ),
}
