"""A quantized network on disk: integers of k bits side by side, a scale for each channel, and the rest as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fipoptim.secondary import OnGrid
from fipoptim.secondary.grid import largest_integer

_INTEGERS, _SCALES, _QUANTIZED = ".integers", ".scales", "quantized"


def export(
    state: Mapping[str, Tensor], grids: Mapping[str, OnGrid], bits: int, folder: Path
) -> dict[str, int]:
    """Writes a quantized network in two files.

    ``weights.safetensors`` loads into the plain model. ``quantized.safetensors`` has packed integers and float32 scales
    in place of the weights that are on the grid; :func:`load_quantized` reads it.

    Args:
        state: The weights and buffers of the plain model.
        grids: Integers and scales by parameter name.
        bits: The bits of a weight.
        folder: The folder of the files; made if it is missing.

    Returns:
        The size of each file in bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    files = {name: folder / f"{name}.safetensors" for name in ("weights", "quantized")}
    save_file(state, files["weights"])
    shapes = {name: list(grid.integers.shape) for name, grid in grids.items()}
    metadata = {_QUANTIZED: json.dumps({"bits": bits, "shapes": shapes})}
    save_file(_packed_state(state, grids, bits), files["quantized"], metadata)
    return {name: file.stat().st_size for name, file in files.items()}


def load_quantized(path: Path) -> tuple[dict[str, Tensor], dict[str, OnGrid]]:
    """Reads ``quantized.safetensors``.

    Returns:
        The state dict that :func:`export` was given, bit for bit, with float32 weights; and the integers and scales.
    """
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()[_QUANTIZED])
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    grids = {}
    for name, shape in told["shapes"].items():
        integers = unpacked(stored.pop(name + _INTEGERS), told["bits"], int(np.prod(shape)))
        grids[name] = OnGrid(integers.view(shape), stored.pop(name + _SCALES))
    return stored | {name: grid.weights() for name, grid in grids.items()}, grids


def size_in_bytes(state: Mapping[str, Tensor], grids: Mapping[str, OnGrid], bits: int) -> int:
    """The bytes of all tensors of ``quantized.safetensors``, without the header of the file."""
    packed = _packed_state(state, grids, bits)
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.values())


def packed(integers: Tensor, bits: int) -> Tensor:
    """Integers of the grid as uint8 ``(bytes,)``: k bits each, the lowest bit first, without gaps."""
    unsigned = (integers.flatten().short() + largest_integer(bits)).to(torch.uint8).cpu().numpy()
    one_a_row = np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(one_a_row, bitorder="little"))


def unpacked(stored: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` integers that :func:`packed` stored, int8 ``(count,)``."""
    every = np.unpackbits(stored.numpy(), count=count * bits, bitorder="little")
    unsigned = np.packbits(every.reshape(count, bits), axis=1, bitorder="little")[:, 0]
    return (torch.from_numpy(unsigned).short() - largest_integer(bits)).to(torch.int8)


def _packed_state(
    state: Mapping[str, Tensor], grids: Mapping[str, OnGrid], bits: int
) -> dict[str, Tensor]:
    rest = {name: tensor for name, tensor in state.items() if name not in grids}
    integers = {name + _INTEGERS: packed(grid.integers, bits) for name, grid in grids.items()}
    scales = {name + _SCALES: grid.scales.cpu() for name, grid in grids.items()}
    return rest | integers | scales
