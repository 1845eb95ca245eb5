"""What a network says of its inputs, and the parts of it that are asked for."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """What a network says of its inputs.

    Attributes:
        held: The outputs that are to stay, ``(N, ...)``.
        learnt: The scores of the new classes, ``(N, classes)``.
        features: What the head sees, ``(N, width)``.
    """

    held: Tensor
    learnt: Tensor
    features: Tensor


def held(outputs: Outputs) -> Tensor:
    """The outputs that are to stay, which is the output space of anchors."""
    return outputs.held


def features(outputs: Outputs) -> Tensor:
    """What the head sees."""
    return outputs.features
