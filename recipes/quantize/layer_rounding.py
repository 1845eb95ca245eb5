r"""Rounding the weights of one layer in turn, each error made good on the weights of the layer that are still free.

This is GPTQ (Frantar et al., 2022; Optimal Brain Surgeon for quantization). The output of a layer changes by
:math:`\|(W - \hat W) X\|^2`, which is quadratic with the Hessian :math:`H = X X^\top` of the layer's inputs X. Columns
are rounded one after the other. The error of each is divided among the columns after it, by the Cholesky factor of
:math:`H^{-1}`, as makes the change smallest. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipoptim.secondary import OnGrid
from fipoptim.secondary.grid import largest_integer, nearest_on_grid

Layer = nn.Conv2d | nn.Linear
_IMAGES_AT_ONCE = 50  # whose patches are in memory at a time


class Rounded(NamedTuple):
    """A layer that was rounded.

    Attributes:
        grid: Its integers and scales.
        before: The weights as they were when the turn of each came, errors of others made good; rounding them by
            themselves gives ``grid``. Shape of the weight, float32.
    """

    grid: OnGrid
    before: Tensor


class _Reached(Exception):
    """Raised at a layer to end a forward pass there."""


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """The linear and convolution layers by name, in the order of the definition, which is that of a pass."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Layer)}


@torch.no_grad()
def input_gram(model: nn.Module, layer: Layer, batches: Iterable[Tensor]) -> Tensor:
    r"""The sum :math:`X X^\top` over all inputs (and positions) of a layer, float64 ``(columns, columns)``.

    Args:
        model: The network in the mode in which it is.
        layer: One of its layers.
        batches: Inputs of the network.
    """
    size = layer.weight[0].numel()
    gram = torch.zeros(size, size, dtype=torch.float64, device=layer.weight.device)

    def stop(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        for inputs in arguments[0].split(_IMAGES_AT_ONCE):
            x = _rows(layer, inputs).double()
            gram.addmm_(x.T, x)
        raise _Reached

    hook = layer.register_forward_pre_hook(stop)
    try:
        for inputs in batches:
            try:
                model(inputs)
            except _Reached:
                continue
    finally:
        hook.remove()
    return gram


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
    W, H = W[:, order], gram[order][:, order]
    H.diagonal().add_(damping * sizes.mean().clamp_min(torch.finfo(torch.float64).tiny))
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


def _rows(layer: Layer, inputs: Tensor) -> Tensor:
    """The inputs of a layer as rows ``(n, columns)``: for a convolution, the patches that it sees."""
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, -2)
    assert layer.groups == 1
    assert not isinstance(layer.padding, str)
    patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)
