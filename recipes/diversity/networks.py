"""The networks that ``recipes.diversity`` makes ensembles of, with the defaults for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torchvision.models import vgg16_bn

from recipes.common.networks import digits_mlp, paper_cnn, vgg_small
from recipes.diversity.attack_settings import AttackSettings
from recipes.diversity.held_function import FunctionOptions
from recipes.diversity.methods.distillation import DistillationOptions
from recipes.diversity.methods.fast_geometric import FastGeometricOptions
from recipes.diversity.methods.path import PathOptions
from recipes.diversity.objectives.misalign import MisalignOptions
from recipes.diversity.objectives.objective import ObjectiveOptions
from recipes.diversity.objectives.withstand import WithstandOptions
from recipes.diversity.settings import EnsembleSettings


@dataclass(frozen=True)
class Network:
    """A network that ensembles are made of here.

    Attributes:
        build: Makes the network, newly initialised.
        data: The name of its data set.
        settings: The default settings.
        attacks: The default attacks on its ensembles.
        augment: Whether the inputs of training are augmented.
    """

    build: Callable[[], nn.Module]
    data: str
    settings: EnsembleSettings
    attacks: AttackSettings
    augment: bool = False


_CIFAR = Network(
    vgg_small,
    "cifar10",
    EnsembleSettings(
        members=5,
        epochs=8,
        batch_size=128,
        autocast=True,
        method_options=(
            FunctionOptions(batch_statistics=True),
            ObjectiveOptions(away=1800, between=150, between_share=1 / 3),
            MisalignOptions(noise=4 / 255),
            WithstandOptions(withstand_beta=0.08, withstand_eps=6 / 255),
            DistillationOptions(distillation_lr=3e-3),
        ),
    ),
    AttackSettings(attack_eps=(2 / 255, 4 / 255, 6 / 255, 8 / 255, 12 / 255), table_eps=4 / 255),
    augment=True,
)
NETWORKS = {
    "digits-mlp": Network(
        digits_mlp,
        "digits",
        EnsembleSettings(
            members=4,
            epochs=30,
            batch_size=32,
            method_options=(
                FunctionOptions(anchor_batch=256),
                ObjectiveOptions(away=400, between=50),
                PathOptions(straight_eps=0.3, eps=0.5),
                MisalignOptions(beta=0.01, noise=0.15),
                WithstandOptions(withstand_beta=5.0, withstand_eps=0.2),
                DistillationOptions(distillation_lr=3e-3),
                FastGeometricOptions(cycle_epochs=4.0, cycle_lr=0.1),
            ),
        ),
        AttackSettings(
            attack_eps=(0.05, 0.1, 0.15, 0.2),
            table_eps=0.1,
            attack_images=450,
            white_box_images=200,
        ),
    ),
    "cnn": Network(
        lambda: paper_cnn(10),
        "fashion-mnist",
        EnsembleSettings(
            members=5,
            epochs=8,
            batch_size=100,
            autocast=True,
            method_options=(MisalignOptions(noise=0.06),),
        ),
        AttackSettings(attack_eps=(0.02, 0.04, 0.06, 0.08, 0.1), table_eps=0.06),
    ),
    "vgg-small": _CIFAR,
    "vgg16": dataclasses.replace(
        _CIFAR,
        build=lambda: vgg16_bn(num_classes=10),
        settings=_CIFAR.settings.changed(members=10, epochs=60),
    ),
}
