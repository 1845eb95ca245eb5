"""The distance to the nearest quantized network, as an objective."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fipoptim.secondary.grid import OnGrid, nearest_on_grid
from fipoptim.secondary.weights import ProjectedWeights, Weighting, wide

LEAST_BITS, MOST_BITS = 2, 8


class QuantizedProjection:
    r"""Squared distance to the nearest network whose weights are on a grid of k bits.

    Each output channel (an entry of the first dimension of a parameter) has a grid of its own: the integers from
    :math:`-(2^{k-1} - 1)` to :math:`2^{k-1} - 1` times one scale. It is symmetric, so that 2 bits are ternary weights.
    In the norm :math:`\sum_i h_i w_i^2` the nearest weights :math:`q_i` and the scale that is best for them minimise

    .. math:: L(w) = \sum_i h_i (w_i - q_i(w))^2.

    The scale is found exactly: as it falls, the nearest integers change one after the other, and the search goes
    through all of these changes (``fipoptim.secondary.grid``). That sorts :math:`2^{k-1} - 1` numbers for each
    weight, so a call takes much longer at 8 bits than at 4.

    The gradient is :math:`2 h_i (w_i - q_i)`, the pull towards the projection. It is exact: at the best integers and
    scales the distance does not change with them to first order (the envelope theorem). With :math:`h = 1` the distance
    is Euclidean. With the diagonal of the anchors' metric as :math:`h` the squared distance is, to leading order and
    neglecting cross terms, the mean squared change of the anchors' outputs by rounding, so the objective approaches the
    network that is nearest in its *function*.

    The parameters are looked up by name at each use, so they may be replaced, or moved to another device. A use raises
    a ValueError if one of them is gone, is no parameter any more, no longer has the shape of its weighting, or is not
    finite.

    Args:
        model: The network that is optimized.
        bits: The bits k of a weight, from 2 to 8. ``bits`` can be assigned later, so a schedule may lower them.
        weighting: :math:`h`. None stands for 1. A mapping gives a tensor of non-negative weights for each parameter
            name, in the parameter's shape; it must cover the parameters that are quantized. An :class:`AnchorMetric`
            stands for its diagonal, which is computed at once. ``weighting`` can be assigned later, to follow the
            metric along the path. A channel whose weighting is zero throughout is quantized as if it were 1.
        keep: Names of parameters or modules (all parameters below a module) that are not to be quantized.

    Attributes:
        names: The parameters that are quantized: those that require a gradient, have two dimensions or more (the
            weights of linear, convolution and embedding layers; neither biases nor norms), and are not excluded by
            ``keep``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``bits`` are out of range, if a name is unknown, if nothing is left to quantize, or if a
            weighting has the wrong shape, lacks a parameter that is quantized or holds negative or non-finite values.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: int,
        *,
        weighting: Weighting = None,
        keep: Iterable[str] = (),
    ) -> None:
        self._weights = ProjectedWeights(model, keep, verb="quantize", owner=QuantizedProjection)
        self.names = self._weights.names
        self.bits = bits
        self.weighting = weighting

    @property
    def total(self) -> int:
        """The number of weights that are quantized."""
        return sum(p.numel() for p in self._weights.parameters.values())

    @property
    def bits(self) -> int:
        """The bits of a weight."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        self._bits = _checked_bits(bits)

    @property
    def weighting(self) -> Mapping[str, Tensor] | None:
        """The weights ``h`` by parameter name, or None for the Euclidean distance."""
        return self._weights.weighting

    @weighting.setter
    def weighting(self, weighting: Weighting) -> None:
        self._weights.weighting = weighting

    def __call__(self) -> Tensor:
        """The squared distance, a scalar with a graph to the parameters; integers and scales are constants in it."""
        parts = []
        parameters, weighting = self._weights.parameters, self._weights.weighting_on_devices()
        for name, grid in self.integers().items():
            parameter = parameters[name]
            # The squares of half-precision weights, and their sums, are taken in float32.
            precise = wide(parameter)
            squares = (parameter.to(precise) - grid.weights(precise)).square()
            parts.append((squares if weighting is None else squares * weighting[name]).sum())
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()

    def distance(self) -> float:
        """The root of the squared distance, in the units of the weights times those of √h.

        It is zero up to rounding for a network on the grid.
        """
        with torch.no_grad():
            return math.sqrt(float(self()))

    @torch.no_grad()
    def integers(self) -> dict[str, OnGrid]:
        """The nearest network: the integers and scales of each parameter by its name.

        ``found[name].integers`` is int8 in the parameter's shape, ``found[name].scales`` float32 ``(channels,)``, and
        ``found[name].weights(dtype)`` are the weights, as :meth:`project_` sets them.
        """
        weighting = self._weights.weighting_on_devices()
        found = {}
        for name, parameter in self._weights.parameters.items():
            if not bool(torch.isfinite(parameter.float()).all()):  # scales are float32
                raise ValueError(
                    f"model: {name} holds NaN or infinite values, so no network is nearest; reload the weights."
                )
            h = None if weighting is None else weighting[name]
            found[name] = nearest_on_grid(parameter, self._bits, h)
        return found

    @torch.no_grad()
    def project_(self) -> dict[str, OnGrid]:
        """Set the model's weights to those of the nearest network.

        Returns:
            What :meth:`integers` gave. The weights are ``scale * integer`` bit for bit, so this is all that has to be
            kept of them.

        Raises:
            ValueError: If a weight is NaN or infinite; the weights stay as they were.
        """
        found = self.integers()
        for name, parameter in self._weights.parameters.items():
            parameter.copy_(found[name].weights(parameter.dtype))
        return found


def _checked_bits(bits: Any) -> int:
    """``bits`` as an int, if it is a whole number of any library within the range.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is out of range.
    """
    is_bool = isinstance(bits, bool) or getattr(bits, "dtype", None) in (torch.bool, "bool")
    try:
        if is_bool:
            raise TypeError
        checked = operator.index(bits)
    except TypeError:
        raise TypeError(f"bits: must be a whole number, got {bits!r}.") from None
    if not LEAST_BITS <= checked <= MOST_BITS:
        raise ValueError(
            f"bits: must be from {LEAST_BITS} to {MOST_BITS}, got {bits!r}; 2 bits are ternary weights."
        )
    return checked
