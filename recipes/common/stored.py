"""Files that a resumed run reads back. Each file holds the configuration that made it and is refused for any other.

Only tensors and plain values are read, so resuming in somebody else's folder runs no code of theirs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.common.data import DataError
from recipes.common.files import read_json, read_untrusted, replace, write_json

T = TypeVar("T")
Config = Mapping[str, Any]  # everything that a file's content depends on; JSON can hold it
_CONFIG = "config"


def save_tensors(path: Path, state: Mapping[str, Tensor], config: Config) -> None:
    """Writes a safetensors file, whole or not at all. Tensors are made contiguous: networks may be channels last."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {_CONFIG: json.dumps(config)}
    replace(path, lambda temporary: save_file(plain, temporary, metadata))


def load_tensors(path: Path, config: Config) -> dict[str, Tensor]:
    """Returns what :func:`save_tensors` wrote with this configuration.

    Raises:
        DataError: If the file is of another configuration (with the differences), or cannot be read.
    """
    check_tensors(path, config)
    return load_file(path)


def check_tensors(path: Path, config: Config) -> None:
    """Checks the configuration of a file that :func:`save_tensors` wrote, and reads nothing else of it.

    Raises:
        DataError: If the file is of another configuration (with the differences), or cannot be read.
    """

    def metadata() -> Any:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(_CONFIG, "null"))

    refuse_another(path, _read(path, metadata), config)


def save_state(path: Path, state: Mapping[str, Any], config: Config) -> None:
    """Writes tensors and plain values with ``torch.save``, whole or not at all."""
    content = {**state, _CONFIG: json.dumps(config)}
    replace(path, lambda temporary: torch.save(content, temporary))


def load_state(path: Path, config: Config) -> dict[str, Any] | None:
    """Returns what :func:`save_state` wrote with this configuration; None if there is no such file.

    Raises:
        DataError: If the file is of another configuration (with the differences), cannot be read, or holds anything
            but tensors and plain values.
    """
    if not path.exists():
        return None
    content = _read(path, lambda: torch.load(path, weights_only=True))
    known = isinstance(content, dict) and isinstance(content.get(_CONFIG), str)
    refuse_another(path, json.loads(content.pop(_CONFIG)) if known else None, config)
    state: dict[str, Any] = content
    return state


def save_record(path: Path, record: Mapping[str, Any], config: Config) -> None:
    """Writes JSON, whole or not at all."""
    write_json(path, {_CONFIG: config, **record})


def load_record(path: Path, config: Config) -> dict[str, Any] | None:
    """Returns what :func:`save_record` wrote with this configuration; None if there is no such file.

    Raises:
        DataError: If the file is of another configuration (with the differences), or cannot be read.
    """
    if not path.exists():
        return None
    content = _read(path, lambda: read_json(path))
    refuse_another(path, content.get(_CONFIG) if isinstance(content, dict) else None, config)
    return content


def refuse_another(path: Path, found: Any, wanted: Config) -> None:
    """Refuses a file of another configuration, or of none.

    Args:
        path: The file, for the message.
        found: The configuration that the file holds.
        wanted: The configuration asked for.

    Raises:
        DataError: With the differences.
    """
    if not isinstance(found, dict):
        raise DataError(
            f"--resume: {path} does not say which configuration made it; choose another --out"
        )
    different = differences(found, wanted)
    if different:
        raise DataError(
            f"--resume: {path} is of another configuration ({different}); choose another --out"
        )


def differences(old: Config, new: Config) -> str:
    """Says in which keys the configuration that is there differs from the one asked for; empty if in none."""
    # JSON makes no difference between tuples and lists, so compare the two as JSON has them.
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))

    def shown(config: Config, key: str) -> str:
        return repr(config[key]) if key in config else "nothing"

    pairs = {key: (shown(old, key), shown(new, key)) for key in sorted({*old, *new})}
    return "; ".join(f"{key} {a} there, {b} asked for" for key, (a, b) in pairs.items() if a != b)


def identity(checkpoint: Path | None) -> dict[str, str | None]:
    """The entries of a configuration about the file that a run starts from: its name and its SHA-256."""
    if checkpoint is None:
        return {"checkpoint": None, "checkpoint_sha256": None}
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"checkpoint": checkpoint.name, "checkpoint_sha256": digest}


def _read(path: Path, read: Callable[[], T]) -> T:
    return read_untrusted(
        read,
        unsafe=f"--resume: {path} holds more than tensors and plain values, or is damaged, and was not loaded; "
        "choose another --out",
        unreadable=f"--resume: {path} cannot be read: {{reason}}; remove it or choose another --out",
    )
