"""The files of a recorded path: one safetensors file for each network, and the index that lists them.

The path is what ``index.json`` lists. It is written before the first network, and a network is listed once its
file is whole, so a process that is killed at any moment leaves a folder that can be opened or, as long as the
index lists nothing, recorded into. The index holds the SHA-256 of each network, which is compared whenever the
network is read, and with each entry a CRC-32 of itself up to there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import os
import reprlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

__all__ = ["Entry", "Layout", "PathFolder", "PathPoint", "import_for"]

_INDEX = "index.json"
_FORMAT = {"format": "fipoptim-path", "version": 1}
_PURPOSE = "keep a path in a folder"


@dataclass(frozen=True)
class PathPoint:
    """What is known of one recorded network beside its weights.

    Attributes:
        step: Optimizer steps taken since the recording began; 0 is the start network.
        drift: The drift in output space that the optimizer reported with that step (for the start network, of
            the anchors as they stood), or None if it reported none, or one that is not finite.
        length: Euclidean length of the polyline through the recorded networks up to this one, over the
            parameters, in the units of the weights.
    """

    step: int
    drift: float | None
    length: float


@dataclass(frozen=True)
class Layout:
    """What all networks of a path have in common.

    Attributes:
        parameters: The shape of every parameter by its first name.
        aliases: The further names of tied tensors, and the name that each is kept under.
    """

    parameters: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """One network in the index: what is known of it, and the SHA-256 of its file in hexadecimal."""

    point: PathPoint
    sha256: str


class PathFolder:
    """Reads and writes the files of one recorded path.

    Raises:
        ImportError: If safetensors is not installed.
    """

    def __init__(self, folder: Path) -> None:
        _safetensors()
        # Absolute, since a process may change its working directory while it records.
        self._folder = folder.absolute()

    @property
    def index(self) -> Path:
        """The file that lists the networks."""
        return self._folder / _INDEX

    def network(self, i: int) -> Path:
        """The file of the i-th network."""
        return self._folder / f"network-{i:05d}.safetensors"

    # Writing

    def prepare(self) -> None:
        """Make the folder, unless a path is in it.

        Raises:
            FileExistsError: If the folder is a file, or holds a recorded path or a part of one.
        """
        self._refuse_a_path()
        self._folder.mkdir(parents=True, exist_ok=True)

    def begin(self, every: int, layout: Layout) -> None:
        """Write an index without networks, so that the folder can be opened from now on.

        Raises:
            FileExistsError: As :meth:`prepare`.
            OSError: If it cannot be written.
        """
        self.prepare()
        for leftover in [*self._folder.glob("network-*.partial"), _partial(self.index)]:
            with contextlib.suppress(OSError):
                leftover.unlink()
        self._write_index(every, layout, [])

    def write_network(self, i: int, state: Mapping[str, Tensor]) -> str:
        """Write the i-th network, which the index must not list, and return the SHA-256 of its file.

        Raises:
            OSError: If it cannot be written, or if the index has been removed.
        """
        self._refuse_another_folder(self.network(i))
        return _write(self.network(i), lambda file: _safetensors().save_file(dict(state), file))

    def write_index(self, every: int, layout: Layout, entries: Sequence[Entry]) -> None:
        """Write the index of ``entries``, whose files are whole.

        Raises:
            OSError: If it cannot be written, or if the index has been removed; it is as it was.
        """
        self._refuse_another_folder(self.index)
        self._write_index(every, layout, entries)

    def _write_index(self, every: int, layout: Layout, entries: Sequence[Entry]) -> None:
        common = _common(every, layout)
        checksum = _checksum(common)
        networks = []
        for entry in entries:
            known = asdict(entry.point) | {"sha256": entry.sha256}
            checksum = _checksum(known, checksum)
            networks.append(known | {"crc32": checksum})
        text = json.dumps(common | {"networks": networks}, indent=1) + "\n"
        _write(self.index, lambda file: file.write_text(text, encoding="utf-8"))

    def _refuse_another_folder(self, file: Path) -> None:
        # The index would list networks that are not in it.
        if not self.index.is_file():
            raise FileNotFoundError(
                f"{file} cannot be written, since {self.index} was removed while the path was recorded"
            )

    def _refuse_a_path(self) -> None:
        if self._folder.exists() and not self._folder.is_dir():
            raise FileExistsError(f"folder: {str(self._folder)!r} is a file; give a folder.")
        try:
            held = bool(self.read_index()[2]) if self.index.exists() else False
        except (ValueError, FileNotFoundError):
            held = True  # damaged, and perhaps still of use to its owner
        # A process that was killed at its first network leaves that one, and no index that lists it.
        others = set(self._folder.glob("network-*.safetensors")) - {self.network(0)}
        if held or others:
            what = "already holds a recorded path" if held else f"holds networks and no {_INDEX}"
            raise FileExistsError(
                f"folder: {str(self._folder)!r} {what}. Choose another folder, remove this one, "
                "or read it with FIPPath.open(folder)."
            )

    # Reading

    def read_index(self) -> tuple[int, Layout, list[Entry]]:
        """Read the index: ``every``, what the networks have in common, and what is listed of each.

        Raises:
            FileNotFoundError: If there is no index, or a network that it lists is missing.
            ValueError: If the index is not one that :meth:`write_index` writes.
        """
        if not self.index.is_file():
            raise FileNotFoundError(
                f"folder: {str(self._folder)!r} holds no recorded path (no {_INDEX} in it). "
                "Give the folder that was given to opt.record(folder=...)."
            )
        try:
            every, layout, entries = _read_index(self.index.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"folder: {self.index} is not the index of a recorded path: {error}. "
                "Restore it from a copy; it is not meant to be edited."
            ) from error
        for i in range(len(entries)):
            if not self.network(i).is_file():
                raise FileNotFoundError(
                    f"folder: {self.network(i)} is listed in {_INDEX} and is not there; restore it."
                )
        return every, layout, entries

    def check(self, i: int, layout: Layout, entry: Entry) -> None:
        """Read the i-th network's file once and compare it with what the index says.

        Raises:
            FileNotFoundError: If the file is missing.
            ValueError: If it is not the file that was written.
        """
        file = self.network(i)
        found = _sha256(file)
        if found != entry.sha256:
            raise ValueError(
                f"folder: {file} is not the network that was recorded (its SHA-256 is {found}, "
                f"{_INDEX} says {entry.sha256}); restore it from a copy."
            )
        with self.slices(i) as stored:
            names = set(stored.keys())
            for name, shape in layout.parameters.items():
                got = tuple(stored.get_slice(name).get_shape()) if name in names else "missing"
                if got != shape:
                    raise ValueError(
                        f"folder: {file} has {name} {got}, {_INDEX} says {shape}; restore it from a copy."
                    )
            lost = set(layout.aliases.values()) - names
            if lost:
                raise ValueError(
                    f"folder: {file} lacks {sorted(lost)}, which {_INDEX} gives a second name."
                )

    def read_network(self, i: int, layout: Layout, entry: Entry) -> dict[str, Tensor]:
        """The tensors of the i-th network, checked. They are backed by the file: copy what is kept.

        Raises:
            FileNotFoundError: As :meth:`check`.
            ValueError: As :meth:`check`.
        """
        self.check(i, layout, entry)
        state: dict[str, Tensor] = _safetensors().load_file(self.network(i))
        return state

    @contextlib.contextmanager
    def slices(self, i: int) -> Iterator[Any]:
        """The i-th network, unchecked, as what safetensors reads parts of tensors from."""
        module = import_for(_PURPOSE, "safetensors")
        try:
            opened = module.safe_open(self.network(i), framework="pt")
        except module.SafetensorError as error:
            raise ValueError(
                f"folder: {self.network(i)} is no safetensors file: {error}."
            ) from error
        with opened as stored:
            yield stored


def import_for(purpose: str, module: str) -> ModuleType:
    """An optional dependency, imported now that it is needed.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f'{package} is needed to {purpose} and is not installed: pip install "fipoptim[recipes]".'
        ) from error


def _safetensors() -> ModuleType:
    return import_for(_PURPOSE, "safetensors.torch")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _partial(file: Path) -> Path:
    return file.with_name(file.name + ".partial")


def _write(file: Path, write: Callable[[Path], object]) -> str:
    """Write a file beside its place and move it there, so that a reader never sees half of one.

    Returns:
        The SHA-256 of the file.

    Raises:
        OSError: If it cannot be written; the message names the file, whichever library wrote it.
    """
    partial = _partial(file)
    failures = (OSError, import_for(_PURPOSE, "safetensors").SafetensorError)
    try:
        write(partial)
        digest = _sha256(partial)
        os.replace(partial, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, failures):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise OSError(f"{file}: {error}") from error
    return digest


# --- the index ----------------------------------------------------------------------------------------


def _common(every: int, layout: Layout) -> dict[str, Any]:
    shapes = {name: list(shape) for name, shape in layout.parameters.items()}
    return {**_FORMAT, "every": every, "parameters": shapes, "aliases": dict(layout.aliases)}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode("ascii")


def _checksum(known: Mapping[str, Any], before: int = 0) -> int:
    """The CRC-32 of a part of the index and of all parts before it, of which ``before`` is the CRC-32."""
    return zlib.crc32(_canonical(known), before)


def _read_index(text: str) -> tuple[int, Layout, list[Entry]]:
    """What ``PathFolder.write_index`` wrote; a ValueError says what else it is."""
    found = json.loads(text, parse_constant=_refuse_constant)
    _need(isinstance(found, dict), "it is no JSON object")
    version = {key: found.get(key) for key in _FORMAT}
    _need(
        _canonical(version) == _canonical(_FORMAT),
        f"it says {reprlib.repr(version)}; fipoptim reads {_FORMAT}",
    )
    _need_keys("it", found, {*_FORMAT, "every", "parameters", "aliases", "networks"})
    every = found["every"]
    _need(
        _is_count(every, 1), f"every must be a whole number, 1 or more, got {reprlib.repr(every)}"
    )
    layout = _read_layout(found["parameters"], found["aliases"])
    _need(
        isinstance(found["networks"], list),
        f"networks must be a list, got {reprlib.repr(found['networks'])}",
    )
    checksum = _checksum(_common(every, layout))
    entries: list[Entry] = []
    for i, network in enumerate(found["networks"]):
        entry = _read_entry(f"networks[{i}]", network, entries[-1].point if entries else None)
        known = {key: value for key, value in network.items() if key != "crc32"}
        checksum = _checksum(known, checksum)
        _need(
            network["crc32"] == checksum,
            f"networks[{i}], or what is before it, was changed after it was written "
            f"(its CRC-32 is {checksum}, not {reprlib.repr(network['crc32'])})",
        )
        entries.append(entry)
    return every, layout, entries


def _read_layout(parameters: Any, aliases: Any) -> Layout:
    _need(
        isinstance(parameters, dict)
        and all(
            isinstance(shape, list) and all(_is_count(size, 0) for size in shape)
            for shape in parameters.values()
        ),
        f"parameters must map names to shapes, got {reprlib.repr(parameters)}",
    )
    _need(
        isinstance(aliases, dict)
        and all(
            isinstance(name, str) and name not in aliases and alias not in parameters
            for alias, name in aliases.items()
        ),
        f"aliases must map further names of tensors to the first, got {reprlib.repr(aliases)}",
    )
    return Layout({name: tuple(shape) for name, shape in parameters.items()}, aliases)


def _read_entry(where: str, network: Any, before: PathPoint | None) -> Entry:
    _need(isinstance(network, dict), f"{where} must be an object, got {reprlib.repr(network)}")
    _need_keys(where, network, {"step", "drift", "length", "sha256", "crc32"})
    step, drift, length = network["step"], network["drift"], network["length"]
    _need(
        _is_count(step, 0) and (step == 0 if before is None else step > before.step),
        f"{where}: step must be 0 first and then a whole number above the last, got {reprlib.repr(step)}",
    )
    _need(
        drift is None or _is_size(drift),
        f"{where}: drift must be null or a finite number, 0 or more, got {reprlib.repr(drift)}",
    )
    _need(
        _is_size(length) and (length == 0 if before is None else length >= before.length),
        f"{where}: length must be 0 first and then a finite number, no less than the last, "
        f"got {reprlib.repr(length)}",
    )
    return Entry(PathPoint(step, drift, length), network["sha256"])


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _need_keys(where: str, found: Mapping[str, Any], keys: set[str]) -> None:
    _need(
        found.keys() == keys, f"{where} must have {sorted(keys)}, got {reprlib.repr(sorted(found))}"
    )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_size(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of an index")
