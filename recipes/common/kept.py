"""Files that a resumed run reads back: each carries the configuration that made it, and serves no other.

Tensors and plain values alone are read, so a folder of somebody else's can be resumed without running code of theirs.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.common import report
from recipes.common.data import DataError

Config = Mapping[str, Any]  # what a file's content depends on; JSON can hold it
_CONFIG = "config"


def save_tensors(path: Path, state: Mapping[str, Tensor], config: Config) -> None:
    """Writes safetensors, whole or not at all, in the plain layout: networks here may be channels last."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {_CONFIG: json.dumps(config)}
    report.replace(path, lambda temporary: save_file(plain, temporary, metadata))


def load_tensors(path: Path, config: Config) -> dict[str, Tensor]:
    """What :func:`save_tensors` wrote with this configuration.

    Raises:
        DataError: If the file is of another configuration (with the differences), or cannot be read.
    """
    check_tensors(path, config)
    return load_file(path)


def check_tensors(path: Path, config: Config) -> None:
    """Raises what :func:`load_tensors` raises, and reads no more than the configuration."""

    def metadata() -> Any:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(_CONFIG, "null"))

    refuse_another(path, _read(path, metadata), config)


def save_state(path: Path, state: Mapping[str, Any], config: Config) -> None:
    """Writes tensors and plain values with ``torch.save``, whole or not at all."""
    content = {**state, _CONFIG: json.dumps(config)}
    report.replace(path, lambda temporary: torch.save(content, temporary))


def load_state(path: Path, config: Config) -> dict[str, Any]:
    """What :func:`save_state` wrote with this configuration.

    Raises:
        DataError: If the file is of another configuration (with the differences), cannot be read, or holds anything
            but tensors and plain values.
    """
    content = _read(path, lambda: torch.load(path, weights_only=True))
    known = isinstance(content, dict) and isinstance(content.get(_CONFIG), str)
    refuse_another(path, json.loads(content.pop(_CONFIG)) if known else None, config)
    state: dict[str, Any] = content
    return state


def save_record(path: Path, record: Mapping[str, Any], config: Config) -> None:
    """Writes JSON, whole or not at all."""
    report.write_json(path, {_CONFIG: config, **record})


def load_record(path: Path, config: Config) -> dict[str, Any] | None:
    """What :func:`save_record` wrote with this configuration; None if there is no such file.

    Raises:
        DataError: If the file is of another configuration (with the differences), or cannot be read.
    """
    if not path.exists():
        return None
    content = _read(path, lambda: report.read_json(path))
    refuse_another(path, content.get(_CONFIG) if isinstance(content, dict) else None, config)
    record: dict[str, Any] = content
    return record


def refuse_another(path: Path, found: Any, wanted: Config) -> None:
    """Refuses a file of another configuration, or of none.

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
    """What differs between the configuration of a run that is there and the one asked for; empty if nothing does."""
    # As JSON has them: tuples and lists are the same.
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))

    def shown(config: Config, key: str) -> str:
        return repr(config[key]) if key in config else "nothing"

    pairs = {key: (shown(old, key), shown(new, key)) for key in sorted({*old, *new})}
    return "; ".join(f"{key} {a} there, {b} asked for" for key, (a, b) in pairs.items() if a != b)


def identity(checkpoint: Path | None) -> dict[str, str | None]:
    """What a configuration says of the network that a run starts from: its name, and what tells it from others."""
    if checkpoint is None:
        return {"checkpoint": None, "checkpoint_sha256": None}
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"checkpoint": checkpoint.name, "checkpoint_sha256": digest}


def _read(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except pickle.UnpicklingError as error:
        # torch's message tells how to run what the file holds, which nobody should.
        raise DataError(
            f"--resume: {path} holds more than tensors and plain values, or is damaged, and was not loaded; "
            "choose another --out"
        ) from error
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"--resume: {path} cannot be read: {reason}; remove it or choose another --out"
        ) from error
