"""A network with more classes: its head grows, and the old network is compared with it on all classes."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AmongMoreClasses(nn.Module):
    """A network among more classes than it has outputs: it never says the others.

    Their logits are minus infinity, so that their probability is 0. This is the reference for a network with more
    outputs, in the space of probabilities: the outputs of both have the same width, and an input whose prediction
    becomes a new class has another prediction than before.

    Args:
        model: Gives logits ``(n, old classes)``; shared, not copied.
        classes: The number of all classes.
    """

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(n, classes)``."""
        z: Tensor = self.model(inputs)
        return F.pad(z, (0, self.classes - z.shape[1]), value=-math.inf)


def head_of(model: nn.Module) -> nn.Linear:
    """The last linear layer of a network."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]


@torch.no_grad()
def with_more_classes(model: nn.Module, classes: int, bias: float) -> nn.Module:
    """A copy whose head has more outputs: the old ones as they were, and new ones that are constant.

    Args:
        model: A network that ends with a linear layer with a bias.
        classes: The number of all classes.
        bias: The value of the new outputs.
    """
    grown = copy.deepcopy(model).requires_grad_(True)
    head = head_of(grown)
    more = classes - head.out_features
    head.weight = nn.Parameter(F.pad(head.weight, (0, 0, 0, more)))
    head.bias = nn.Parameter(F.pad(head.bias, (0, more), value=bias))
    head.out_features = classes
    return grown


def quiet_bias(logits: Tensor, more: int) -> float:
    """A value of ``more`` new outputs with which they change no prediction, whatever each input's other outputs are.

    All of them together weigh as much in the softmax as the least of the largest old outputs.

    Args:
        logits: The old outputs ``(n, old classes)``.
        more: The number of new outputs.
    """
    return float(logits.amax(dim=1).min()) - math.log(2 * more)
