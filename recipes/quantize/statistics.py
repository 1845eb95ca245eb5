"""Running statistics of batch norm for a quantized network, measured on few images beside the dense network's.

The statistics of few images are not those that the dense network was trained with. What has changed by quantization is
known much better than the statistics themselves, because both networks see the same images. So the dense network's
running statistics are carried over: the mean is as many standard deviations away from that of the images as it was, and
the variance is in the same ratio to theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recipes.common.batch_statistics import with_statistics
from recipes.common.training import batch_norms


@torch.no_grad()
def with_carried_statistics(
    model: nn.Module, dense: nn.Module, batches: Sequence[Tensor]
) -> nn.Module:
    """The network that is shipped: the weights of ``model``, and running statistics carried over from ``dense``.

    Args:
        model: What :func:`recipes.common.batch_statistics.by_batch` made of ``dense``; its weights have moved.
        dense: The dense network in eval mode; left as it is.
        batches: Inputs on which the statistics of both are measured. They are not read if there is no batch norm.

    Returns:
        A copy of ``dense`` in eval mode, with the parameters of ``model``.
    """
    made = with_statistics(model, dense, batches)
    before = with_statistics(copy.deepcopy(dense), dense, batches)
    for layer, then, trained in zip(
        batch_norms(made), batch_norms(before), batch_norms(dense), strict=True
    ):
        mean, var = _statistics(layer)
        mean_then, var_then = _statistics(then)
        mean_trained, var_trained = _statistics(trained)
        ratio = (var + layer.eps) / (var_then + layer.eps)
        mean += (mean_trained - mean_then) * ratio.sqrt()
        var.copy_(var_trained * ratio)
        layer.get_buffer("num_batches_tracked").copy_(trained.get_buffer("num_batches_tracked"))
    return made


def _statistics(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.get_buffer("running_mean"), layer.get_buffer("running_var")
