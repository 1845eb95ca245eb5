"""The parameters over which a metric is taken: their names in the model, and which ones are refused."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fipoptim.shards import named_parameters


def parameter_names(model: nn.Module, params: Iterable[Tensor]) -> list[str]:
    """The names of ``params`` in ``model``, if a metric can be taken over them.

    Args:
        model: The anchors' model.
        params: The parameters.

    Raises:
        ValueError: If a parameter is not the model's.
        TypeError: If a parameter is complex, integer, sparse or of half precision.
    """
    names = {id(p): name for name, p in named_parameters(model).items()}
    found = []
    for i, p in enumerate(params):
        if id(p) not in names:
            raise ValueError(
                f"params: parameter {i} of shape {tuple(p.shape)} does not belong to the anchors' model "
                f"({type(model).__name__}). Build the AnchorBatch on the model that is optimized; if "
                "the model was replaced or moved since, build both anew."
            )
        check_parameter(names[id(p)], p)
        found.append(names[id(p)])
    return found


def check_parameter(name: str, p: Tensor) -> None:
    """Refuse a parameter over which no metric can be taken.

    Raises:
        TypeError: If ``p`` is complex, integer, sparse or of half precision.
    """
    if p.layout != torch.strided:
        raise TypeError(f"params: {name} is sparse ({p.layout}); fipoptim needs dense parameters.")
    if p.dtype not in (torch.float32, torch.float64):
        advice = (
            "keep the weights in float32 and use torch.autocast for the forward pass"
            if p.dtype in (torch.float16, torch.bfloat16)
            else "freeze it or leave it out"
        )
        raise TypeError(
            f"params: {name} has dtype {p.dtype}; the metric needs real float32 or float64: {advice}."
        )
