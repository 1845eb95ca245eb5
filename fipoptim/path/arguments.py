"""Checks of the arguments that the files of this package share."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fipoptim.anchors.evaluation import unwrap


def whole_number(value: Any) -> int | None:
    """``value`` as an int if it is a whole number of any library, else None. A bool is no whole number."""
    try:
        number = operator.index(value)
    except TypeError:
        return None
    is_bool = isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool
    return None if is_bool else number


def network_position(i: Any, count: int) -> int:
    """The index ``i``, which may be negative, of one of ``count`` networks as a number from 0 to ``count - 1``.

    Raises:
        TypeError: If ``i`` is not one whole number.
        IndexError: If there is no i-th network.
    """
    position = whole_number(i)
    if position is None:
        raise TypeError(
            f"index: must be one whole number, got {i!r}; "
            "for several networks: (path[i] for i in range(...))."
        )
    if not -count <= position < count:
        raise IndexError(
            f"index: {i} is outside the path, which has {count} networks; "
            f"choose from {-count} to {count - 1}."
            if count
            else f"index: {i} is outside the path, which has 0 networks; record one first."
        )
    return position % count


def as_folder(folder: Any) -> Path:
    """``folder`` as a Path.

    Raises:
        TypeError: If it is neither a str nor an os.PathLike of text.
    """
    if not isinstance(folder, (str, os.PathLike)) or isinstance(os.fspath(folder), bytes):
        raise TypeError(f"folder: must be a path, a str or os.PathLike, got {folder!r}.")
    return Path(folder)


def as_module(model: Any) -> nn.Module:
    """The module that owns the parameters of ``model``, behind a wrapper such as DistributedDataParallel.

    Raises:
        TypeError: If ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module, got {type(model).__name__}.")
    return unwrap(model)
