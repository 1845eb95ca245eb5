"""How far a function has moved on some inputs: the drift of its outputs, and the predictions that changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fipoptim.anchors.output_space import predictions, squared_distance
from fipoptim.anchors.refusals import check_width
from fipoptim.mean import AnchorMean


@dataclass(frozen=True)
class Measured:
    """The distance of a network from the reference.

    Attributes:
        drift: The mean over the inputs of :math:`‖z - z_{ref}‖²`; infinite if outputs are not finite.
        flips: The share of inputs whose prediction is not that of the reference; 1 if outputs are not finite.
    """

    drift: float
    flips: float


def measured(outputs: Tensor, reference: Tensor, shape: torch.Size) -> Measured:
    """The distance of outputs from their reference, both ``(N, m)``; one row has the given shape in the output space.

    Raises:
        ValueError: If the outputs are of another width than the reference.
    """
    return measured_in_parts([(outputs, reference)], lambda: shape, AnchorMean(len(outputs)))


def measured_in_parts(
    parts: Iterable[tuple[Tensor, Tensor]], shape: Callable[[], torch.Size], mean: AnchorMean
) -> Measured:
    """The distance of outputs from their reference, which come in parts; only one part is held at a time.

    Args:
        parts: Outputs with their reference, both ``(n, m)``, of all inputs of this rank.
        mean: The mean over the inputs of all ranks.
        shape: Gives the shape that one row has in the output space, once the first part is there.

    Raises:
        ValueError: If the outputs are of another width than the reference.
    """
    squared, kept = [], 0
    for outputs, reference in parts:
        squared.append(squared_distance(outputs, reference))
        kept += int(predictions_kept(outputs, reference, shape()).sum())
        del outputs, reference  # frees them before the next part is made
    drift, kept = mean.of_each_with(torch.cat(squared), kept)
    if not math.isfinite(drift):
        return Measured(math.inf, 1.0)
    # A whole number over N: a budget of 0.05 allows 6 of 120, which a difference to 1 would exceed by rounding.
    return Measured(drift, mean.share(mean.count - kept))


def predictions_kept(outputs: Tensor, reference: Tensor, shape: torch.Size) -> Tensor:
    """Whether all predictions of each input are those of the reference, shape ``(N,)``.

    Raises:
        ValueError: If the outputs are of another width than the reference.
    """
    check_width(outputs, reference)
    now = predictions(outputs.reshape(-1, *shape))
    then = predictions(reference.to(outputs.device).reshape(-1, *shape))
    return (now == then).all(dim=1)
