r"""A network that returns its softened outputs and the outputs of some of its layers, each relative to its own size.

Few images say little by their logits alone: 500 of them are 5,000 numbers for 270,000 weights. The outputs of the
layers on the way are thousands of numbers for each image, and a network that holds them all computes as it did. What
matters of the logits is the classes that they tell apart, so they are compared as
:math:`2 T \sqrt{\text{softmax}(z / T)}`: the Fisher metric at a temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recipes.common.features import WithFeatures, softened


class HeldOutputs(nn.Module):
    """Returns what is to be held, in one row for each input: the softened logits, and the outputs of the layers named.

    The squared distance of two such rows is the sum over its parts of the distance relative to the variance of that
    part over the inputs given. The softened logits count as much as all the layers together.

    Args:
        model: The network.
        layers: Names of modules; each is called once in a pass.
        temperature: The temperature of the softmax.
        factors: The factor of each part, the logits first: :meth:`factors_of`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        temperature: float,
        factors: Sequence[float],
    ) -> None:
        super().__init__()
        self.network, self._softened = WithFeatures(model, layers), softened(temperature)
        self._factors = tuple(factors)

    def forward(self, x: Tensor) -> Tensor:
        """The rows ``(n, numbers)``."""
        return torch.cat(
            [c * part for c, part in zip(self._factors, self.parts(x), strict=True)], dim=1
        )

    def parts(self, x: Tensor) -> list[Tensor]:
        """The softened logits and the outputs of the layers, each ``(n, numbers)``."""
        logits, *features = self.network(x)
        return [self._softened(logits), *(feature.flatten(1) for feature in features)]

    @classmethod
    @torch.no_grad()
    def factors_of(
        cls, model: nn.Module, layers: Sequence[str], temperature: float, inputs: Tensor
    ) -> list[float]:
        """The factors for a network and a batch of inputs."""
        network = cls(model, layers, temperature, [1.0] * (1 + len(layers)))
        shares = [1.0, *([1 / len(layers)] * len(layers) if layers else [])]
        variances = [part.var(dim=0, correction=0).sum() for part in network.parts(inputs)]
        return [math.sqrt(share / float(v)) for share, v in zip(shares, variances, strict=True)]
