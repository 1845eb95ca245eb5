"""A sparse network on disk: its weights, its masks, and a form that is as small as its zeros allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_ROWS, _COLUMNS, _VALUES, _SHAPE = ".rows", ".columns", ".values", ".shape"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a network on disk, in bytes.

    Attributes:
        dense: The size of the weights with their zeros.
        compressed: The size of the compressed form.
    """

    dense: int
    compressed: int

    def __str__(self) -> str:
        """Both sizes, and their ratio."""
        ratio = self.dense / self.compressed
        return f"{self.compressed:,} bytes compressed, {self.dense:,} dense ({ratio:.1f} times smaller)"


def export(state: Mapping[str, Tensor], names: Sequence[str], folder: Path) -> Sizes:
    """Writes a sparse network in three files.

    ``weights.safetensors`` loads into the plain model. ``masks.safetensors`` holds the masks, bool tensors under the
    same names, True for weights that are kept. ``compressed.safetensors`` holds each sparse parameter as compressed
    rows (CSR) of its ``(outputs, -1)`` view; :func:`load_compressed` reads it.

    Args:
        state: The weights and buffers of the plain model.
        names: Names of the parameters that are sparse.
        folder: The folder of the files; made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(state, folder / "weights.safetensors")
    save_file({name: state[name] != 0 for name in names}, folder / "masks.safetensors")
    compressed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in names:
            compressed[name] = tensor
            continue
        matrix = tensor.flatten(1)
        rows, columns = matrix.nonzero(as_tuple=True)
        counts = rows.bincount(minlength=len(matrix)).cumsum(0)
        small = torch.int16 if matrix.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
        compressed[name + _ROWS] = torch.cat([counts.new_zeros(1), counts]).int()
        compressed[name + _COLUMNS] = columns.to(small)
        compressed[name + _VALUES] = matrix[rows, columns]
        compressed[name + _SHAPE] = torch.tensor(tensor.shape, dtype=torch.int32)
    save_file(compressed, folder / "compressed.safetensors")
    return Sizes(
        dense=(folder / "weights.safetensors").stat().st_size,
        compressed=(folder / "compressed.safetensors").stat().st_size,
    )


def load_compressed(path: Path) -> dict[str, Tensor]:
    """Reads the state dict that :func:`export` compressed, with its zeros."""
    stored = load_file(path)
    names = [key.removesuffix(_SHAPE) for key in stored if key.endswith(_SHAPE)]
    parts = {name + part for name in names for part in (_ROWS, _COLUMNS, _VALUES, _SHAPE)}
    state = {key: tensor for key, tensor in stored.items() if key not in parts}
    for name in names:
        shape = stored[name + _SHAPE].tolist()
        matrix = stored[name + _VALUES].new_zeros(shape).flatten(1)
        counts = stored[name + _ROWS].diff().long()
        rows = torch.arange(len(matrix)).repeat_interleave(counts)
        matrix[rows, stored[name + _COLUMNS].long()] = stored[name + _VALUES]
        state[name] = matrix.view(shape)
    return state
