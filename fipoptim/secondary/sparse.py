"""The distance to the nearest sparse network, as an objective."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fipoptim.secondary.weights import ProjectedWeights, Weighting, wide


class SparseProjection:
    r"""Squared distance to the nearest network that has the given sparsity.

    The distance is measured in the norm :math:`\sum_i h_i w_i^2` over the prunable weights. The nearest network is
    then the one whose :math:`k` weights of smallest :math:`h_i w_i^2` are set to zero, and the squared distance is
    the sum over these weights,

    .. math:: L(w) = \sum_{i \in S_k(w)} h_i w_i^2, \qquad k = \mathrm{round}(\text{sparsity} \cdot n).

    Its gradient is :math:`2 h_i w_i` on them and zero elsewhere: the pull towards the projection. With :math:`h = 1`
    the distance is Euclidean, and the projection is magnitude pruning. With the diagonal of the anchors' metric as
    :math:`h` the squared distance is, to leading order and neglecting cross terms, the mean squared change of the
    anchors' outputs by pruning, so the objective approaches the network that is nearest in its *function*.

    The parameters are looked up by name at each use, so they may be replaced, or moved to another device. A use raises
    a ValueError if one of them is gone, is no parameter any more, or no longer has the shape of its weighting.

    Args:
        model: The network that is optimized.
        sparsity: The fraction of the prunable weights that are to be zero, in ``[0, 1)``. ``sparsity`` can be
            assigned later, so a schedule may raise it.
        weighting: :math:`h`. None stands for 1. A mapping gives a tensor of non-negative weights for each parameter
            name, in the parameter's shape; it must cover the prunable parameters. An :class:`AnchorMetric` stands for
            its diagonal, which is computed at once. ``weighting`` can be assigned later, to follow the metric along
            the path.
        per_layer: True gives each parameter the sparsity by itself. False takes the smallest weights of the network.
        keep: Names of parameters or modules (all parameters below a module) that are not to be pruned.

    Attributes:
        names: The prunable parameters: those that require a gradient, have two dimensions or more (the weights of
            linear, convolution and embedding layers; neither biases nor norms), and are not excluded by ``keep``.
        per_layer: As given.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the sparsity is outside ``[0, 1)`` or leaves no weight (``per_layer``: in some layer), if
            a name is unknown, if nothing is prunable, or if a weighting has the wrong shape, lacks a prunable
            parameter or holds negative or non-finite values.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        weighting: Weighting = None,
        per_layer: bool = False,
        keep: Iterable[str] = (),
    ) -> None:
        self._weights = ProjectedWeights(model, keep, verb="prune", owner=SparseProjection)
        self.names = self._weights.names
        self.per_layer = per_layer
        self.sparsity = sparsity
        self.weighting = weighting

    @property
    def total(self) -> int:
        """The number of prunable weights."""
        return sum(p.numel() for p in self._weights.parameters.values())

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable weights that are to be zero."""
        return self._sparsity

    @sparsity.setter
    def sparsity(self, sparsity: float) -> None:
        given, sparsity = sparsity, _number("sparsity", sparsity)
        if not 0.0 <= sparsity < 1.0:  # NaN is refused too.
            raise ValueError(
                f"sparsity: must be at least 0 and below 1, got {given!r}; 0.9 zeroes 90 % of the weights."
            )
        for name, size in self._sizes().items():
            if round(sparsity * size) >= size:
                raise ValueError(
                    f"sparsity: {sparsity!r} would leave {name} none of its {size} weights. Lower it"
                    + (", or name the layer in keep." if self.per_layer else ".")
                )
        self._sparsity = sparsity

    @property
    def zeros(self) -> int:
        """The number of zeros in the nearest network: ``round(sparsity * total)``, or the sum over the layers."""
        return sum(round(self._sparsity * size) for size in self._sizes().values())

    @property
    def weighting(self) -> Mapping[str, Tensor] | None:
        """The weights ``h`` by parameter name, or None for the Euclidean distance."""
        return self._weights.weighting

    @weighting.setter
    def weighting(self, weighting: Weighting) -> None:
        self._weights.weighting = weighting

    def __call__(self) -> Tensor:
        """The squared distance, a scalar with a graph to the prunable parameters."""
        parts = []
        parameters, weighting = self._weights.parameters, self._weights.weighting_on_devices()
        for name, mask in self.masks().items():
            smallest = parameters[name].masked_fill(mask, 0.0)
            # The squares of half-precision weights, and their sums, are taken in float32.
            squares = smallest.to(wide(smallest)).square()
            parts.append((squares if weighting is None else squares * weighting[name]).sum())
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()

    def distance(self) -> float:
        """The root of the squared distance, in the units of the weights times those of √h."""
        with torch.no_grad():
            return math.sqrt(float(self()))

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """A bool tensor in the shape of each prunable parameter: False at exactly ``zeros`` weights, True elsewhere.

        The weights at False are zero in the nearest network. Equal weights come in the order of ``names``, and by
        index within a parameter; the first of them are set to zero.
        """
        # √h |w| orders the weights as h w² does, and does not underflow as w² may.
        scores = {name: p.detach().abs() for name, p in self._weights.parameters.items()}
        weighting = self._weights.weighting_on_devices()
        if weighting is not None:
            scores = {name: score * weighting[name].sqrt() for name, score in scores.items()}
        if self.per_layer:
            masks = [
                _largest(s.flatten(), round(self._sparsity * s.numel())) for s in scores.values()
            ]
        else:
            device = scores[self.names[0]].device
            flat = torch.cat([score.flatten().to(device) for score in scores.values()])
            masks = list(_largest(flat, self.zeros).split([s.numel() for s in scores.values()]))
        return {
            name: mask.view_as(score).to(score.device)
            for (name, score), mask in zip(scores.items(), masks, strict=True)
        }

    @torch.no_grad()
    def project_(self) -> dict[str, Tensor]:
        """Set the model's weights to those of the nearest network, and return ``masks()``.

        Raises:
            ValueError: If a prunable weight is NaN; the weights stay as they were.
        """
        parameters = self._weights.parameters
        for name, parameter in parameters.items():
            if bool(parameter.isnan().any()):
                raise ValueError(
                    f"model: {name} holds NaN, so no network is nearest; reload the weights."
                )
        masks = self.masks()
        for name, parameter in parameters.items():
            parameter.masked_fill_(~masks[name], 0.0)
        return masks

    def _sizes(self) -> dict[str, int]:
        """The number of weights of each part that has the sparsity by itself: a layer, or the network."""
        if self.per_layer:
            return {name: p.numel() for name, p in self._weights.parameters.items()}
        return {"the network": self.total}


def _number(argument: str, value: Any) -> float:
    """``value`` as a float, if it is a real number of any library and no bool.

    Raises:
        TypeError: If it is not.
    """
    is_bool = isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, "bool")
    if is_bool or isinstance(value, (str, bytes)):
        raise TypeError(f"{argument}: must be a number, got {value!r}.")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument}: must be a number, got {value!r}.") from error


def _largest(scores: Tensor, drop: int) -> Tensor:
    """A mask (n,) that is False at the ``drop`` smallest of the ``scores`` (n,), the first ones among equals."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    if drop == 0:
        return mask
    threshold = scores.kthvalue(drop).values
    below = scores < threshold
    ties = (scores == threshold).nonzero().flatten()
    mask[below] = False
    mask[ties[: drop - int(below.sum())]] = False
    return mask
