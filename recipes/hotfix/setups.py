"""The networks that ``recipes.hotfix`` fixes, by the name of the data, with the defaults for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from recipes.common.networks import digits_mlp, resnet20
from recipes.hotfix.methods.distillation import DistillationOptions
from recipes.hotfix.methods.kfac import KFACOptions
from recipes.hotfix.methods.l2sp import L2SPOptions
from recipes.hotfix.methods.path import PathOptions
from recipes.hotfix.methods.plain import PlainOptions
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
            max_flips=0.03,
            method_options=(PathOptions(beta=1.0, eps=0.1, products="adaptive"),),
        ),
    ),
    "cifar10": Setup(
        resnet20,
        held_out=0.0,
        epochs=None,
        augment=True,
        settings=HotfixSettings(
            anchors=256,
            anchor_batch=128,
            check=1000,
            unseen=3000,
            method_options=(
                PathOptions(beta=0.3, eps=0.03, momentum=0.9, precondition="muon", products=0),
                PlainOptions(plain_lr=(1e-4,)),
                DistillationOptions(distillation_lr=(1e-4, 3e-5), distillation_weight=(0.3, 3.0)),
                L2SPOptions(l2sp_lr=(1e-4,), l2sp_weight=(1.0, 10.0)),
                KFACOptions(kfac_eps=(0.03,), kfac_damping=(0.1, 0.01)),
            ),
        ),
    ),
}
