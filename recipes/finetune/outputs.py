"""What a network says of its inputs, and the parts of it that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fipoptim.anchors.output_space import nats_per_token

MASK = "attention_mask"
Inputs = Mapping[str, Tensor]  # keyword inputs of a network, along dimension 0


class Outputs(NamedTuple):
    """What a network says of its inputs.

    Attributes:
        held: The outputs that are to stay, ``(N, ...)``.
        learnt: The scores of the new classes, ``(N, classes)``; of a language model those of the next tokens,
            ``(N, T, V)``.
        features: What the head sees, ``(N, width)``; None without a head.
    """

    held: Tensor
    learnt: Tensor
    features: Tensor | None


# A part of the outputs for the inputs of the same rows.
Part = Callable[[Outputs, Any], Tensor]


def held(outputs: Outputs, inputs: Any) -> Tensor:
    """The outputs that are to stay, as they are."""
    return outputs.held


def tokens(outputs: Outputs, inputs: Any) -> Tensor:
    """The distributions of the next tokens, 0 at padding: drift is in nats per token."""
    mask: Tensor = inputs[MASK]
    return nats_per_token(outputs.held, inputs) * mask.unsqueeze(-1)


def features(outputs: Outputs, inputs: Any) -> Tensor:
    """What the head sees."""
    assert outputs.features is not None
    return outputs.features
