"""Loads a trained network from a file that the user names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.common.data import DataError
from recipes.common.files import read_untrusted


def load_weights(path: Path, model: nn.Module) -> None:
    """Loads a safetensors file, or a state dict that torch saved, into a model; nothing but tensors is read.

    Raises:
        DataError: If the file cannot be read, or its names or shapes are not the model's.
    """
    state = read_untrusted(
        lambda: (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        ),
        unsafe=f"{path} cannot be read as weights: it is damaged, or holds more than tensors; save model.state_dict()",
        unreadable=f"{path} cannot be read as weights: {{reason}}",
    )
    own = model.state_dict()
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise DataError(f"{path} holds no state dict of tensors; save model.state_dict()")
    # A file of a network with batch norm may leave out the counters of batches.
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unknown = [n for n in state if n not in own]
    other = [
        f"{n} is {tuple(state[n].shape)}, not {tuple(t.shape)}"
        for n, t in own.items()
        if n in state and state[n].shape != t.shape
    ]
    if missing or unknown or other:
        said = [
            f"{label} {', '.join(items[:3])}{' and more' if len(items) > 3 else ''}"
            for label, items in (("lacks", missing), ("has unknown", unknown), ("", other))
            if items
        ]
        raise DataError(f"{path} does not fit the network: {'; '.join(said).strip()}")
    model.load_state_dict({**own, **state})
