"""Whether a model still is the function that it was: what it says of itself, and whether it is random."""

from __future__ import annotations

import ctypes
import enum
import pickle
import random
import sys
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from fipoptim.anchors.batch import AnchorBatch, Inputs, evaluation

RANDOM = (
    "model: two evaluations of the same anchors in eval mode differ, so there is no function to preserve. Switch off "
    "the randomness that stays on in eval mode (functional dropout with training=True, sampling, noise layers)."
)
# What torch keeps of a module beside its weights and what the user sets; ``training`` is always off in evaluation.
_TORCHS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"}


def behaviour_of(model: nn.Module) -> Hashable:
    """All that the attributes of the model's modules say; a value that cannot be compared stands for its identity."""
    return tuple(
        (name, attribute, _said(value))
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in _TORCHS
    )


def _said(value: object, depth: int = 2) -> Hashable:
    if isinstance(value, bool | int | float | complex | str | bytes | None | enum.Enum):
        return type(value), value
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, Mapping) and depth:
        return tuple((_said(k, 0), _said(v, depth - 1)) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset) and depth:
        return tuple(_said(v, depth - 1) for v in value)
    return id(value)


def random_state(device: torch.device) -> Hashable:
    """The state of the generators that a model on ``device`` draws from: torch's own, Python's and numpy's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    # As bytes, read by no operation of torch.
    kept = tuple(ctypes.string_at(state.data_ptr(), state.numel()) for state in states)
    numpy = sys.modules.get("numpy")  # which a model that draws from it has imported
    others = None if numpy is None else pickle.dumps(numpy.random.get_state())
    return kept, random.getstate(), others


def refuse_random(anchors: AnchorBatch, inputs: Inputs) -> None:
    """Refuse a model whose outputs on the first chunk of ``inputs`` depend on the random state.

    Raises:
        ValueError: If two evaluations differ.
    """
    first = anchors.chunks(inputs)[0]
    outputs = []
    for seed in (0, 1):
        with evaluation(anchors.model, anchors.device):
            torch.manual_seed(seed)
            outputs.append(anchors.outputs(first))
    if not torch.allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ValueError(RANDOM)
