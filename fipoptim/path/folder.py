"""The folder of a path on disk: one safetensors file for each network, and ``index.json``, which lists them.

The networks of the path are those that the index lists. An index without networks is written first, and each network
is listed after its file has been written completely. A process that is killed at any moment therefore leaves a folder
that can be opened, or, as long as the index lists nothing, recorded into. The SHA-256 of a network's file is in the
index, and is compared whenever the network is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from fipoptim.optional import import_for
from fipoptim.path.index import Index
from fipoptim.path.store import Piece

_INDEX = "index.json"
_PURPOSE = "keep a path in a folder"


class PathFolder:
    """Reads and writes the files of one recorded path. It is a ``fipoptim.path.store.Store``.

    Args:
        folder: The folder of the files. It need not exist yet.

    Raises:
        ImportError: If safetensors is not installed.
    """

    def __init__(self, folder: Path) -> None:
        _safetensors()
        self.place = f"in {str(folder)!r}"
        # Absolute, because a process may change its working directory while it records.
        self._folder = folder.absolute()

    @property
    def index_file(self) -> Path:
        """The file that lists the networks."""
        return self._folder / _INDEX

    def network_file(self, i: int) -> Path:
        """The file of the i-th network."""
        return self._folder / f"network-{i:05d}.safetensors"

    # Writing

    def prepare(self) -> None:
        """Make the folder if it does not exist.

        Raises:
            FileExistsError: If the folder is a file, or holds a recorded path or a part of one.
        """
        self._refuse_a_recorded_path()
        self._folder.mkdir(parents=True, exist_ok=True)

    def begin(self, index: Index) -> None:
        """Write an index that lists no network, so that the folder can be opened from now on.

        Raises:
            FileExistsError: As :meth:`prepare`.
            OSError: If it cannot be written.
        """
        self.prepare()
        for leftover in [*self._folder.glob("network-*.partial"), _partial(self.index_file)]:
            with contextlib.suppress(OSError):
                leftover.unlink()
        self._write_index(index)

    def write_network(self, i: int, state: Mapping[str, Tensor]) -> str:
        """Write the i-th network, which the index must not list yet, and return the SHA-256 of its file.

        Raises:
            OSError: If it cannot be written, or if the index has been removed.
        """
        file = self.network_file(i)
        self._require_the_index(file)
        return _write(file, lambda path: _safetensors().save_file(dict(state), path))

    def write_index(self, index: Index) -> None:
        """Write the index, whose networks must have been written.

        Raises:
            OSError: If it cannot be written, or if it has been removed. The file stays as it was.
        """
        self._require_the_index(self.index_file)
        self._write_index(index)

    def _write_index(self, index: Index) -> None:
        text = index.to_json()
        _write(self.index_file, lambda path: path.write_text(text, encoding="utf-8"))

    def _require_the_index(self, file: Path) -> None:
        """Refuse to write ``file`` into a folder without an index: the networks recorded earlier are gone from it."""
        if not self.index_file.is_file():
            raise FileNotFoundError(
                f"{file} cannot be written, since {self.index_file} was removed while the path was recorded"
            )

    def _refuse_a_recorded_path(self) -> None:
        if self._folder.exists() and not self._folder.is_dir():
            raise FileExistsError(f"folder: {str(self._folder)!r} is a file; give a folder.")
        try:
            lists_networks = bool(self.read_index().entries) if self.index_file.exists() else False
        except (ValueError, FileNotFoundError):
            lists_networks = True  # The index is damaged, and its owner may still repair it.
        # A process that was killed while it wrote its first network may leave that file, which no index lists.
        others = set(self._folder.glob("network-*.safetensors")) - {self.network_file(0)}
        if lists_networks or others:
            found = (
                "already holds a recorded path"
                if lists_networks
                else f"holds networks and no {_INDEX}"
            )
            raise FileExistsError(
                f"folder: {str(self._folder)!r} {found}. Choose another folder, remove this one, "
                "or read it with FIPPath.open(folder)."
            )

    # Reading

    def read_index(self) -> Index:
        """Read the index.

        Raises:
            FileNotFoundError: If there is no index, or if a network that it lists is missing.
            ValueError: If the index is not one that :meth:`write_index` writes.
        """
        if not self.index_file.is_file():
            raise FileNotFoundError(
                f"folder: {str(self._folder)!r} holds no recorded path (no {_INDEX} in it). "
                "Give the folder that was given to opt.record(folder=...)."
            )
        try:
            index = Index.from_json(self.index_file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"folder: {self.index_file} is not the index of a recorded path: {error}. "
                "Restore it from a copy; it is not meant to be edited."
            ) from error
        for i in range(len(index.entries)):
            if not self.network_file(i).is_file():
                raise FileNotFoundError(
                    f"folder: {self.network_file(i)} is listed in {_INDEX} and is not there; restore it."
                )
        return index

    def check(self, i: int, index: Index) -> None:
        """Read the i-th network's file once and compare it with the index.

        Raises:
            FileNotFoundError: If the file is missing.
            ValueError: If it is not the file that was written.
        """
        file, expected = self.network_file(i), index.entries[i].sha256
        found = _sha256(file)
        if found != expected:
            raise ValueError(
                f"folder: {file} is not the network that was recorded (its SHA-256 is {found}, "
                f"{_INDEX} says {expected}); restore it from a copy."
            )
        with self._opened(i) as stored:
            names = set(stored.keys())
            for name, shape in index.layout.parameters.items():
                got = tuple(stored.get_slice(name).get_shape()) if name in names else "missing"
                if got != shape:
                    raise ValueError(
                        f"folder: {file} has {name} {got}, {_INDEX} says {shape}; restore it from a copy."
                    )
            lost = set(index.layout.aliases.values()) - names
            if lost:
                raise ValueError(
                    f"folder: {file} lacks {sorted(lost)}, which {_INDEX} gives a second name; "
                    "restore it from a copy."
                )

    def read_network(self, i: int, index: Index) -> dict[str, Tensor]:
        """The tensors of the i-th network, checked. They are backed by the file: copy those that you keep.

        Raises:
            FileNotFoundError: As :meth:`check`.
            ValueError: As :meth:`check`.
        """
        self.check(i, index)
        state: dict[str, Tensor] = _safetensors().load_file(self.network_file(i))
        return state

    def read_pieces(self, i: int, pieces: Sequence[Piece]) -> list[Tensor]:
        """Parts of the tensors of the i-th network, unchecked. Only these parts are read.

        Raises:
            ValueError: If the file is no safetensors file.
        """
        with self._opened(i) as stored:
            return [_read_piece(stored, name, part) for name, part in pieces]

    @contextlib.contextmanager
    def _opened(self, i: int) -> Iterator[Any]:
        """The i-th network, unchecked, as the object from which safetensors reads single tensors and slices."""
        module = import_for(_PURPOSE, "safetensors")
        try:
            opened = module.safe_open(self.network_file(i), framework="pt")
        except module.SafetensorError as error:
            raise ValueError(
                f"folder: {self.network_file(i)} is no safetensors file: {error}. Restore it from a copy."
            ) from error
        with opened as stored:
            yield stored


def _safetensors() -> ModuleType:
    return import_for(_PURPOSE, "safetensors.torch")


def _read_piece(stored: Any, name: str, part: slice) -> Tensor:
    whole = stored.get_slice(name)
    tensor: Tensor = whole[part] if whole.get_shape() else stored.get_tensor(name)
    return tensor


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _partial(file: Path) -> Path:
    """The name under which ``file`` is written before it is moved to its place."""
    return file.with_name(file.name + ".partial")


def _write(file: Path, write: Callable[[Path], object]) -> str:
    """Write a file beside its place and move it there, so that a reader never sees half of one.

    Args:
        file: Its place.
        write: Writes it to the path that it is given.

    Returns:
        The SHA-256 of the file.

    Raises:
        OSError: If it cannot be written, also if safetensors raised an error of its own. The message names the file.
    """
    partial = _partial(file)
    write_errors = (OSError, import_for(_PURPOSE, "safetensors").SafetensorError)
    try:
        write(partial)
        digest = _sha256(partial)
        os.replace(partial, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, write_errors):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise OSError(f"{file}: {error}") from error
    return digest
