"""Whether a model still is the function that it was: what its attributes say, and whether it is random."""

from __future__ import annotations

import ctypes
import enum
import pickle
import random
import sys
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from fipoptim.anchors.inputs import Inputs
from fipoptim.anchors.network_function import NetworkFunction
from fipoptim.anchors.refusals import random_model

# Attributes that say nothing of a module's behaviour: torch's own, and ``training``, which is off in every evaluation.
_TORCHS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"}


def behaviour_of(model: nn.Module) -> Hashable:
    """What the attributes of the model's modules say, as a value that is equal as long as they say the same.

    An attribute that cannot be compared stands for its identity.
    """
    return tuple(
        (name, attribute, _comparable(value))
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in _TORCHS
    )


def _comparable(value: object, depth: int = 2) -> Hashable:
    if isinstance(value, bool | int | float | complex | str | bytes | None | enum.Enum):
        return type(value), value
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, Mapping) and depth:
        return tuple((_comparable(k, 0), _comparable(v, depth - 1)) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset) and depth:
        return tuple(_comparable(v, depth - 1) for v in value)
    return id(value)


def random_state(device: torch.device) -> Hashable:
    """The state of the generators that a model on ``device`` draws from: torch's own, Python's and numpy's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    # Read as bytes rather than by an operation of torch, which a dispatch mode would count.
    own = tuple(ctypes.string_at(state.data_ptr(), state.numel()) for state in states)
    numpy = sys.modules.get("numpy")  # a model that draws from numpy has imported it
    others = None if numpy is None else pickle.dumps(numpy.random.get_state())
    return own, random.getstate(), others


def refuse_random(network: NetworkFunction, inputs: Inputs) -> None:
    """Refuse a network whose outputs on ``inputs`` depend on the random state.

    Raises:
        ValueError: If two evaluations differ.
    """
    outputs = []
    for seed in (0, 1):
        with network.evaluation():
            torch.manual_seed(seed)
            outputs.append(network.outputs([inputs]))
    if not torch.allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-6, equal_nan=True):
        raise random_model()
