"""The networks that ``recipes.hotfix`` fixes, by the name of the data, with the defaults for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from recipes.common.networks import digits_mlp, resnet20
from recipes.hotfix.methods.path import PathOptions
from recipes.hotfix.settings import HotfixSettings


@dataclass(frozen=True)
class Setup:
    """A network and how it comes about.

    Attributes:
        build: Makes the network, newly initialised.
        held_out: The share of the training inputs on which it is not trained, beside the test inputs.
        epochs: Passes in which it is trained here; None if it comes from a checkpoint.
        augment: Whether the anchors of a step are augmented, as in the network's training.
        settings: The default settings.
    """

    build: Callable[[], nn.Module]
    held_out: float
    epochs: int | None
    augment: bool
    settings: HotfixSettings


SETUPS = {
    "digits": Setup(
        digits_mlp,
        held_out=0.7,
        epochs=30,
        augment=False,
        settings=HotfixSettings(
            anchors=300,
            anchor_batch=300,
            check=300,
            unseen=500,
            method_options=(PathOptions(eps=0.03),),
        ),
    ),
    "cifar10": Setup(
        resnet20,
        held_out=0.0,
        epochs=None,
        augment=True,
        settings=HotfixSettings(
            anchors=512,
            anchor_batch=128,
            check=2000,
            unseen=3000,
            method_options=(PathOptions(eps=0.03, momentum=0.9, precondition="muon"),),
        ),
    ),
}
