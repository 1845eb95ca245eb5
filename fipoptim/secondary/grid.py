r"""The nearest weights on a symmetric grid of k bits, with one scale for each channel.

The grid of a channel is :math:`s \cdot \{-Q, \ldots, Q\}` with :math:`Q = 2^{k-1} - 1`. For given integers
:math:`q_i` the squared distance :math:`\sum_i h_i (w_i - s q_i)^2` is smallest at :math:`s = A / B`, where
:math:`A = \sum_i h_i w_i q_i` and :math:`B = \sum_i h_i q_i^2`, and is then :math:`\sum_i h_i w_i^2 - A^2 / B`. As the
scale falls from infinity, the magnitude of one integer after the other rises by one: that of weight i rises to j at
:math:`s = |w_i| / (j - \frac12)`. So the nearest integers of every scale are met in the order of these numbers. The
search takes running sums of A and B in that order, and the best of them is the smallest distance of all scales.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 2**22  # numbers that are sorted at a time, in whole channels


class OnGrid(NamedTuple):
    """Weights on a grid.

    Attributes:
        integers: int8, of the shape of the weights; at most ``largest_integer(bits)`` in magnitude.
        scales: float32, one for each channel, shape ``(channels,)``.
    """

    integers: Tensor
    scales: Tensor

    def weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, ``scale * integer`` for each channel, computed in float32 and then converted to ``dtype``."""
        shape = (-1,) + (1,) * (self.integers.dim() - 1)
        return (self.integers.float() * self.scales.view(shape)).to(dtype)


def largest_integer(bits: int) -> int:
    """The largest integer of the grid, :math:`2^{k-1} - 1`."""
    return int(2 ** (bits - 1)) - 1


@torch.no_grad()
def nearest_on_grid(weights: Tensor, bits: int, weighting: Tensor | None = None) -> OnGrid:
    """The nearest weights on the grid, with the best scale for each channel.

    The search is exact up to the rounding of float64. Its time grows with ``largest_integer(bits)`` and with the number
    of weights. Of scales that are equally good it takes the largest.

    Args:
        weights: Finite weights, two dimensions or more; channels are along the first.
        bits: The bits k of the grid, 2 or more.
        weighting: The weights :math:`h`, finite and not negative, in the shape of ``weights``; None stands for 1. A
            channel in which none counts is quantized as if all were 1.

    Returns:
        The integers and scales. A channel of zeros has the scale 1.
    """
    rows = weights.detach().flatten(1).double()
    h = torch.ones_like(rows) if weighting is None else weighting.detach().flatten(1).to(rows)
    h = torch.where((h * rows).any(dim=1, keepdim=True), h, 1.0)
    most = largest_integer(bits)
    at_once = max(1, _AT_ONCE // (rows.shape[1] * most))
    parts = zip(rows.abs().split(at_once), h.split(at_once), strict=True)
    scales = torch.cat([_scales(size, weight, most) for size, weight in parts])
    integers = _integers(rows, scales, most)
    return OnGrid(integers.view(weights.shape), scales)


@torch.no_grad()
def integers_at(weights: Tensor, scales: Tensor, bits: int) -> OnGrid:
    """The nearest weights on the grid of given scales.

    Args:
        weights: Finite weights, two dimensions or more; channels are along the first.
        scales: Positive scales, shape ``(channels,)``.
        bits: The bits k of the grid.
    """
    scales = scales.float()
    integers = _integers(weights.detach().flatten(1).double(), scales, largest_integer(bits))
    return OnGrid(integers.view(weights.shape), scales)


def _integers(rows: Tensor, scales: Tensor, most: int) -> Tensor:
    """The nearest integers int8 ``(channels, n)`` for float64 weights and float32 scales."""
    return (rows / scales.double()[:, None]).round().clamp(-most, most).to(torch.int8)


def _scales(sizes: Tensor, h: Tensor, most: int) -> Tensor:
    """The best scales, float32 ``(channels,)``, of magnitudes and their weighting, both float64 ``(channels, n)``."""
    largest = sizes.amax(dim=1, keepdim=True)
    zero = largest == 0
    sizes = sizes / torch.where(
        zero, 1.0, largest
    )  # the squares of very small or large weights are no float64
    h = h / h.amax(dim=1, keepdim=True)
    levels = torch.arange(1, most + 1, dtype=sizes.dtype, device=sizes.device)
    # (channels, n, levels): the scales at which integers rise, and by how much A and B rise there.
    rises = sizes[:, :, None] / (levels - 0.5)
    a = (h * sizes)[:, :, None].expand_as(rises)
    b = h[:, :, None] * (2 * levels - 1)
    order = rises.flatten(1).argsort(dim=1, descending=True, stable=True)
    A = a.flatten(1).gather(1, order).cumsum(dim=1)
    B = b.flatten(1).gather(1, order).cumsum(dim=1)
    gained = torch.where(B > 0, A.square() / B, 0.0)
    best = gained.argmax(dim=1, keepdim=True)
    scales = torch.where(zero, 1.0, A.gather(1, best) / B.gather(1, best) * largest)
    return scales[:, 0].float().clamp_min(torch.finfo(torch.float32).tiny)
