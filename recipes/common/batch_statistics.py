"""Batch norm that normalises by the statistics of each batch while weights move, and by running statistics at the end.

In eval mode running statistics are constants. As weights move, they no longer fit what the layers see, and a path
through many weights ends at a worse network than training does. A network without running statistics computes in eval
mode what it computes in training, so an ``AnchorBatch`` holds it like any other network. When its weights have moved,
running statistics are measured once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from recipes.common.training import batch_norms


def by_batch(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose batch norm layers normalise by the statistics of the batch, and keep none."""
    model = copy.deepcopy(model).eval()
    for layer in batch_norms(model):
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return model


@torch.no_grad()
def with_statistics(model: nn.Module, like: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """The network that is shipped: it has the weights of ``model`` and running statistics measured on ``batches``.

    Args:
        model: A network that :func:`by_batch` made; its weights may have moved since.
        like: A network of the same architecture with running statistics; left as it is.
        batches: Inputs; the statistics are the mean over batches. They are not read if there is no batch norm.

    Returns:
        A copy of ``like`` in eval mode, with the parameters and other buffers of ``model``.
    """
    made = copy.deepcopy(like).eval()
    made.load_state_dict(model.state_dict(), strict=False)  # it lacks the statistics
    layers = batch_norms(made)
    if not layers:
        return made
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
    for inputs in batches:
        made(inputs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return made.eval()
