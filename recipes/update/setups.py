"""The networks that ``recipes.update`` updates, by name, with the data and the defaults of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from recipes.common.networks import digits_mlp, narrow_resnet18
from recipes.update.methods.path import PathOptions
from recipes.update.settings import UpdateSettings


@dataclass(frozen=True)
class Setup:
    """A network and its data.

    Attributes:
        data: The name of the data set, of whose classes the first half are the old ones.
        build: Makes the network of a number of classes, newly initialised.
        augment: Whether labelled inputs are augmented.
        settings: The default settings.
    """

    data: str
    build: Callable[[int], nn.Module]
    augment: bool
    settings: UpdateSettings


def _narrow_resnet18(classes: int) -> nn.Module:
    return narrow_resnet18(classes, stride=2)


SETUPS = {
    "digits": Setup(
        "digits",
        digits_mlp,
        augment=False,
        settings=UpdateSettings(
            old_epochs=20,
            batch_size=32,
            held_out=0.3,
            epochs=20,
            baseline_epochs=150,
            max_flips=(0.01, 0.02, 0.05),
            method_options=(PathOptions(anchors=400, anchor_batch=100, precondition="adam"),),
        ),
    ),
    "resnet18-narrow": Setup(
        "cifar100",
        _narrow_resnet18,
        augment=True,
        settings=UpdateSettings(
            old_epochs=8,
            batch_size=100,
            held_out=0.1,
            epochs=1,
            baseline_epochs=2,
            max_flips=(0.1, 0.2, 0.3),
            method_options=(
                PathOptions(anchors=1500, anchor_batch=50, beta=1.0, eps=1.0, settle_products=8),
            ),
        ),
    ),
}
