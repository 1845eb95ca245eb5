"""Weights on a grid that move: a network computes with the integers nearest to free numbers, times scales.

Each quantized weight is the scale of its channel times a free number that is rounded to an integer of the grid. The
derivative passes straight through the rounding: it is taken as 1 within the grid, and as 0 beyond it. So a step of some
length is as many steps of the grid in every channel, whatever its scale is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fipoptim.secondary import OnGrid
from fipoptim.secondary.grid import largest_integer


class _Rounded(nn.Module):
    """A weight on the grid of its channels."""

    def __init__(self, scales: Tensor, bits: int) -> None:
        super().__init__()
        self.log_scales = nn.Parameter(scales.log())  # a step changes each by a share of itself
        self._most = largest_integer(bits)

    def forward(self, numbers: Tensor) -> Tensor:
        within = numbers.clamp(-self._most, self._most)
        integers = within + (within.round() - within).detach()
        return integers * _by_channel(self.log_scales.exp(), numbers)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / _by_channel(self.log_scales.exp(), weight)

    def grid(self, numbers: Tensor) -> OnGrid:
        integers = numbers.round().clamp(-self._most, self._most)
        return OnGrid(integers.to(torch.int8), self.log_scales.exp())


class RoundedWeights:
    """The weights of a network, each of them rounded to a grid.

    Parametrized parameters replace the plain ones; build optimizers and anchors after this.

    Args:
        model: The network; changed in place.
        free: The weights by the names of the parameters; each is seen rounded to the grid.
        scales: The scale of each channel by the same names.
        bits: The bits of a weight.
    """

    def __init__(
        self,
        model: nn.Module,
        free: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        bits: int,
    ) -> None:
        self._places: dict[str, tuple[nn.Module, str, _Rounded]] = {}
        for name, weight in free.items():
            module_name, _, tensor = name.rpartition(".")
            module = model.get_submodule(module_name)
            rounded = _Rounded(scales[name], bits)
            with torch.no_grad():
                module.get_parameter(tensor).copy_(weight)
            parametrize.register_parametrization(module, tensor, rounded)
            self._places[name] = (module, tensor, rounded)

    @torch.no_grad()
    def finish(self) -> dict[str, OnGrid]:
        """Returns the integers and scales of now, and makes plain parameters of the weights again."""
        found = {}
        for name, (module, tensor, rounded) in self._places.items():
            inner = f"parametrizations.{tensor}.original"
            found[name] = rounded.grid(module.get_parameter(inner))
            parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
        return found


def _by_channel(scales: Tensor, weight: Tensor) -> Tensor:
    """Scales ``(channels,)`` in a shape that multiplies the channels of ``weight``."""
    return scales.view(-1, *[1] * (weight.dim() - 1))
