"""The features of a network, held beside its outputs.

The outputs of few images say little of a network: 500 images of ten classes are 5,000 numbers, and ResNet-20 has
270,000 weights. What its layers compute on the way are 86,000 numbers an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from recipes.common.features import WithFeatures
from recipes.common.networks import BasicBlock

FEATURE_INPUTS = 2000  # the deviations of features are measured on no more inputs than these
INPUTS_AT_ONCE = 100  # inputs on which features are computed at a time


def feature_modules(model: nn.Module) -> list[str]:
    """The names of the modules whose outputs are features: the residual blocks, or the activations without any."""
    for kind in (BasicBlock, nn.ReLU):
        names = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if names:
            return names
    raise ValueError("model: has neither residual blocks nor activations that are modules.")


@torch.no_grad()
def deviations(network: WithFeatures, inputs: Tensor) -> list[float]:
    """The standard deviation of each module's features over the inputs and features."""
    parts = [network(x)[1:] for x in inputs.split(INPUTS_AT_ONCE)]
    return [float(torch.cat(of_one).std()) for of_one in zip(*parts, strict=True)]


def distance(
    features: Sequence[Tensor], reference: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    """The mean squared difference of features in units of their deviation: a scalar, the mean over modules."""
    parts = [
        ((a - b) / scale).square().mean()
        for a, b, scale in zip(features, reference, scales, strict=True)
    ]
    return torch.stack(parts).mean()


def joined(
    output: Callable[[Tensor], Tensor], scales: Sequence[float], weight: float
) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """The output space of :class:`WithFeatures`, with the drift of ``output`` plus ``weight`` times :func:`distance`.

    Args:
        output: The output space of the logits.
        scales: The deviation of each module's features.
        weight: The weight of the features.

    Returns:
        A function of what :class:`WithFeatures` returns, to rows ``(n, m)``.
    """

    def space(found: tuple[Tensor, ...]) -> Tensor:
        logits, *features = found
        parts = [output(logits)]
        for feature, scale in zip(features, scales, strict=True):
            flat = feature.flatten(1)
            size = (weight / (len(features) * flat.shape[1])) ** 0.5 / scale
            parts.append(flat * size)
        return torch.cat(parts, dim=1)

    return space
