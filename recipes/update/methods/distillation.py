"""Distillation: plain training, and the divergence from the old network's outputs on the inputs of old classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.common.options import RATE, positive
from recipes.common.settings import option
from recipes.update.case import Case
from recipes.update.learning import Loss
from recipes.update.methods.gradient import GradientMethod
from recipes.update.settings import UpdateSettings


@dataclass(frozen=True)
class DistillationOptions:
    """The options of distillation."""

    group: ClassVar[str] = "distillation"
    distillation_lr: float = option("Adam's highest learning rate", default=3e-3, **RATE)
    distillation_weight: float = option("weight of the divergence", default=1.0, **RATE)
    distillation_temperature: float = option(
        "temperature of the outputs", default=1.0, type=positive, metavar="X"
    )


class Distillation(GradientMethod):
    """Cross-entropy of all inputs, and the divergence of those of old classes."""

    title = "distillation"
    option_kinds = (DistillationOptions,)

    def lr(self, settings: UpdateSettings) -> float:
        """See :class:`GradientMethod`."""
        return settings.of(DistillationOptions).distillation_lr

    def loss(self, case: Case, settings: UpdateSettings) -> Loss:
        """See :class:`GradientMethod`."""
        own = settings.of(DistillationOptions)

        def loss(x: Tensor, z: Tensor, labels: Tensor) -> Tensor:
            _, apart = divergence(case, x, z, labels, own.distillation_temperature)
            # A mean over all inputs of the step, as the cross-entropy is.
            held = own.distillation_weight * apart.sum() / len(labels)
            return F.cross_entropy(z, labels) + held

        return loss


def divergence(
    case: Case, x: Tensor, z: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """How far the outputs of old classes' inputs are from the old network's.

    Args:
        case: The case, with the old network.
        x: The inputs of a step.
        z: Their outputs ``(n, classes)`` now.
        labels: Their classes ``(n,)``.
        temperature: The temperature T of the outputs. The divergence is multiplied by its square (Hinton et al., 2015).

    Returns:
        Of the inputs of old classes, whether the old network gets each right, and the KL divergence of each.
    """
    rows = labels < case.old_classes
    with torch.no_grad():
        before = case.old(x[rows])
    apart = F.kl_div(
        (z[rows] / temperature).log_softmax(dim=1),
        (before / temperature).softmax(dim=1),  # 0 for new classes, which adds nothing
        reduction="none",
    ).sum(dim=1)
    return before.argmax(dim=1) == labels[rows], temperature**2 * apart
