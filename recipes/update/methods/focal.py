"""Focal distillation (positive-congruent training, Yan et al., 2021): most weight where the old network is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from recipes.common.options import RATE, positive
from recipes.common.settings import option
from recipes.update.case import Case
from recipes.update.learning import Loss
from recipes.update.methods.distillation import divergence
from recipes.update.methods.gradient import GradientMethod
from recipes.update.settings import UpdateSettings


@dataclass(frozen=True)
class FocalOptions:
    """The options of focal distillation; the paper has weights of 1 and 5."""

    group: ClassVar[str] = "focal distillation"
    focal_lr: float = option("Adam's highest learning rate", default=3e-3, **RATE)
    focal_alpha: float = option("weight of each input of an old class", default=1.0, **RATE)
    focal_beta: float = option(
        "weight of those that the old network gets right, beside alpha", default=5.0, **RATE
    )
    focal_temperature: float = option(
        "temperature of the outputs", default=1.0, type=positive, metavar="X"
    )


class FocalDistillation(GradientMethod):
    r"""Each divergence has the weight :math:`\alpha + \beta \cdot 1[\text{the old network is right}]`."""

    title = "focal distillation"
    option_kinds = (FocalOptions,)

    def lr(self, settings: UpdateSettings) -> float:
        """See :class:`GradientMethod`."""
        return settings.of(FocalOptions).focal_lr

    def loss(self, case: Case, settings: UpdateSettings) -> Loss:
        """See :class:`GradientMethod`."""
        own = settings.of(FocalOptions)

        def loss(x: Tensor, z: Tensor, labels: Tensor) -> Tensor:
            right, apart = divergence(case, x, z, labels, own.focal_temperature)
            weight = own.focal_alpha + own.focal_beta * right
            return F.cross_entropy(z, labels) + (weight * apart).sum() / len(labels)

        return loss
