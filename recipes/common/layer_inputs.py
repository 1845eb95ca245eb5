r"""The second moment of what the layers of a network see: what methods that go layer by layer know of the inputs.

The output of a layer whose weight becomes :math:`\hat W` changes by :math:`\|(W - \hat W) X\|^2` for the layer's inputs
X. This is quadratic, with the Hessian :math:`X X^\top`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common.options import RATE
from recipes.common.settings import option

Layer = nn.Conv2d | nn.Linear
_IMAGES_AT_ONCE = 50  # whose patches are in memory at a time


@dataclass(frozen=True, kw_only=True)
class LayerwiseOptions:
    """The options of methods that go layer by layer."""

    group: ClassVar[str] = "layer by layer"

    damping: float = option(
        "added to the diagonal of a layer's Hessian, as a share of its mean", default=0.01, **RATE
    )


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
            x = _rows(layer, inputs)
            gram.add_(x.T @ x)  # float32 among few images, float64 over all
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


def damped(gram: Tensor, damping: float) -> Tensor:
    """The gram ``(n, n)`` with ``damping`` times the mean of its diagonal added to the diagonal."""
    mean = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    return gram + damping * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _rows(layer: Layer, inputs: Tensor) -> Tensor:
    """The inputs of a layer as rows ``(n, columns)``: for a convolution, the patches that it sees."""
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, -2)
    assert layer.groups == 1
    assert not isinstance(layer.padding, str)
    patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)
