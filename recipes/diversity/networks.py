"""The networks that ``recipes.diversity`` makes ensembles of, and how each is made and attacked by default."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torchvision.models import vgg16_bn

from recipes.common.networks import digits_mlp, paper_cnn, vgg_small
from recipes.diversity.settings import Settings


@dataclass(frozen=True)
class Attacks:
    """How ensembles are attacked; every field is an option of the command line.

    Attributes:
        attack_eps: Largest changes of a pixel, for transfer.
        table_eps: The one at which members and the joint ensemble are attacked themselves.
        attack_images: The first test images, attacked for transfer.
        white_box_images: As many of them for attacks on members and on the joint ensemble.
        auto_attack_images: As many of them for AutoAttack; 0 leaves it out.
        attack_steps: Of each attack.
        attack_restarts: Of each attack.
    """

    attack_eps: tuple[float, ...]
    table_eps: float
    attack_images: int = 1000
    white_box_images: int = 500
    auto_attack_images: int = 100
    attack_steps: int = 20
    attack_restarts: int = 1


@dataclass(frozen=True)
class Network:
    """What ensembles are made of here."""

    build: Callable[[], nn.Module]
    data: str
    settings: Settings
    attacks: Attacks
    augment: bool = False


_CIFAR = Network(
    vgg_small,
    "cifar10",
    Settings(
        members=5,
        epochs=8,
        batch_size=128,
        autocast=True,
        away=1800,
        between=150,
        between_share=1 / 3,
        withstand_beta=0.08,
        withstand_eps=6 / 255,
        batch_statistics=True,
        noise=4 / 255,
        distillation_lr=3e-3,
    ),
    Attacks((2 / 255, 4 / 255, 6 / 255, 8 / 255, 12 / 255), table_eps=4 / 255),
    augment=True,
)
NETWORKS = {
    "digits-mlp": Network(
        digits_mlp,
        "digits",
        Settings(
            members=4,
            epochs=30,
            batch_size=32,
            anchor_batch=256,
            straight_eps=0.3,
            eps=0.5,
            away=400,
            between=50,
            beta=0.01,
            withstand_beta=5.0,
            withstand_eps=0.2,
            noise=0.15,
            distillation_lr=3e-3,
            cycle_epochs=4.0,
            cycle_lr=0.1,
        ),
        Attacks((0.05, 0.1, 0.15, 0.2), table_eps=0.1, attack_images=450, white_box_images=200),
    ),
    "cnn": Network(
        lambda: paper_cnn(10),
        "fashion-mnist",
        Settings(
            members=5,
            epochs=8,
            batch_size=100,
            autocast=True,
            noise=0.06,
        ),
        Attacks((0.02, 0.04, 0.06, 0.08, 0.1), table_eps=0.06),
    ),
    "vgg-small": _CIFAR,
    "vgg16": dataclasses.replace(
        _CIFAR,
        build=lambda: vgg16_bn(num_classes=10),
        settings=dataclasses.replace(_CIFAR.settings, members=10, epochs=60),
    ),
}
