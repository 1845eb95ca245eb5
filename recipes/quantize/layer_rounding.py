r"""Rounding the weights of one layer in turn, each error made good on the weights of the layer that are still free.

This is GPTQ (Frantar et al., 2022; Optimal Brain Surgeon for quantization). The change of a layer's output is quadratic
in the change of its weight, with the Hessian :math:`H = X X^\top` (``recipes.common.layer_inputs``). Columns are
rounded one after the other. The error of each is divided among the columns after it, by the Cholesky factor of
:math:`H^{-1}`, as makes the change smallest. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fipoptim.secondary import OnGrid
from fipoptim.secondary.grid import largest_integer, nearest_on_grid
from recipes.common.layer_inputs import damped, input_gram, layers_of


class Rounded(NamedTuple):
    """A layer that was rounded.

    Attributes:
        grid: Its integers and scales.
        before: The weights as they were when the turn of each came, errors of others made good; rounding them by
            themselves gives ``grid``. Shape of the weight, float32.
    """

    grid: OnGrid
    before: Tensor


@torch.no_grad()
def rounded(weight: Tensor, gram: Tensor, bits: int, *, damping: float) -> Rounded:
    """Rounds the weight of a layer, the columns with the largest inputs first.

    The scale of each channel is the best one in the norm of the gram's diagonal.

    Args:
        weight: The weight, channels first.
        gram: What :func:`input_gram` returned.
        bits: The bits of a weight.
        damping: Added to the diagonal of the gram, as a share of its mean.
    """
    W = weight.detach().flatten(1).double().clone()
    sizes = gram.diagonal()
    scales = nearest_on_grid(W, bits, sizes.expand_as(W)).scales
    most, s = largest_integer(bits), scales.double()
    order = sizes.argsort(descending=True, stable=True)
    W, H = W[:, order], damped(gram[order][:, order], damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    factor = torch.linalg.cholesky(inverse, upper=True)
    integers = torch.empty_like(W)
    for j in range(W.shape[1]):
        integers[:, j] = (W[:, j] / s).round().clamp(-most, most)
        error = (W[:, j] - s * integers[:, j]) / factor[j, j]
        W[:, j + 1 :].addr_(error, factor[j, j + 1 :], alpha=-1)
    back = order.argsort()
    grid = OnGrid(integers[:, back].to(torch.int8).view(weight.shape), scales)
    return Rounded(grid, W[:, back].float().view(weight.shape))


@torch.no_grad()
def rounded_in_turn(
    model: nn.Module, batches: Sequence[Tensor], bits: int, *, damping: float
) -> Iterator[tuple[str, Rounded]]:
    """Rounds the layers of a network in place, and yields the name of each weight with what was found for it."""
    for name, layer in layers_of(model).items():
        found = rounded(layer.weight, input_gram(model, layer, batches), bits, damping=damping)
        layer.weight.copy_(found.grid.weights())
        yield f"{name}.weight", found
