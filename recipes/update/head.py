"""A network with more classes: its head grows, and the new outputs begin so low that no prediction changes."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def head_of(model: nn.Module) -> nn.Linear:
    """The last linear layer of a network."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]


@torch.no_grad()
def with_more_classes(model: nn.Module, classes: int, bias: float) -> nn.Module:
    """A copy whose head has more outputs: the old ones as they were, and new ones that are constant.

    Args:
        model: A network that ends with a linear layer with a bias.
        classes: The number of all classes.
        bias: The value of the new outputs. With minus infinity the new classes have probability 0: this is the old
            network among all classes, which is the reference for an update in the space of probabilities.
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

    All of them together weigh half as much in the softmax as the least of the largest old outputs.

    Args:
        logits: The old outputs ``(n, old classes)``.
        more: The number of new outputs.
    """
    return float(logits.amax(dim=1).min()) - math.log(2 * more)
