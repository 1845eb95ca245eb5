"""The index of a path: step, drift, path length and checksum of each network, and how they are written as JSON.

The JSON names its format and version. Each network has the SHA-256 of its file, and a CRC-32 of the index from its
beginning up to and including that network, so an index that was edited or damaged is not read.
"""

from __future__ import annotations

import json
import math
import reprlib
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fipoptim.path.snapshot import Layout

FORMAT = {"format": "fipoptim-path", "version": 1}


@dataclass(frozen=True)
class PathPoint:
    """Step, drift and path length of one recorded network.

    Attributes:
        step: The number of optimizer steps since the recording began; 0 for the start network.
        drift: The drift in output space that the optimizer reported with that step. For the start network it is
            the anchors' drift when the recording began. None if no drift was reported, or one that is not finite.
        length: The Euclidean length of the polyline through the recorded networks up to this one, over the
            parameters, in the units of the weights.
    """

    step: int
    drift: float | None
    length: float


@dataclass(frozen=True)
class Entry:
    """One network in the index: its point, and the SHA-256 of its file in hexadecimal, or "" if it is in memory."""

    point: PathPoint
    sha256: str


@dataclass(frozen=True)
class Index:
    """The networks of one path, without their weights.

    Attributes:
        every: The number of steps between two recorded networks.
        layout: The names and shapes of the tensors, which all networks have in common.
        entries: The networks in the order in which they were recorded. A recording appends to it.
    """

    every: int
    layout: Layout
    entries: list[Entry] = field(default_factory=list)

    def to_json(self) -> str:
        """The text that :meth:`from_json` reads."""
        header = _header(self.every, self.layout)
        checksum = _checksum(header)
        networks = []
        for entry in self.entries:
            known = asdict(entry.point) | {"sha256": entry.sha256}
            checksum = _checksum(known, checksum)
            networks.append(known | {"crc32": checksum})
        return json.dumps(header | {"networks": networks}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Index:
        """Read the text that :meth:`to_json` wrote.

        Raises:
            ValueError: If it is not such a text. The message says in what it differs.
            RecursionError: If it is nested too deeply to be read.
        """
        found = json.loads(text, parse_constant=_refuse_constant)
        _require(isinstance(found, dict), "it is no JSON object")
        version = {key: found.get(key) for key in FORMAT}
        _require(
            _canonical(version) == _canonical(FORMAT),
            f"it says {reprlib.repr(version)}; fipoptim reads {FORMAT}",
        )
        _require_keys("it", found, {*FORMAT, "every", "parameters", "aliases", "networks"})
        every, networks = found["every"], found["networks"]
        _require(
            _is_count(every, 1),
            f"every must be a whole number, 1 or more, got {reprlib.repr(every)}",
        )
        layout = _read_layout(found["parameters"], found["aliases"])
        _require(
            isinstance(networks, list), f"networks must be a list, got {reprlib.repr(networks)}"
        )
        checksum = _checksum(_header(every, layout))
        entries: list[Entry] = []
        for i, network in enumerate(networks):
            entry = _read_entry(f"networks[{i}]", network, entries[-1].point if entries else None)
            known = {key: value for key, value in network.items() if key != "crc32"}
            checksum = _checksum(known, checksum)
            _require(
                network["crc32"] == checksum,
                f"networks[{i}], or what is before it, was changed after it was written "
                f"(its CRC-32 is {checksum}, not {reprlib.repr(network['crc32'])})",
            )
            entries.append(entry)
        return cls(every, layout, entries)


def _header(every: int, layout: Layout) -> dict[str, Any]:
    """The part of the index that comes before the networks."""
    shapes = {name: list(shape) for name, shape in layout.parameters.items()}
    return {**FORMAT, "every": every, "parameters": shapes, "aliases": dict(layout.aliases)}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode("ascii")


def _checksum(part: Mapping[str, Any], before: int = 0) -> int:
    """The CRC-32 of a part of the index and of all parts before it. ``before`` is the CRC-32 of those."""
    return zlib.crc32(_canonical(part), before)


def _read_layout(parameters: Any, aliases: Any) -> Layout:
    _require(
        isinstance(parameters, dict)
        and all(
            isinstance(shape, list) and all(_is_count(size, 0) for size in shape)
            for shape in parameters.values()
        ),
        f"parameters must map names to shapes, got {reprlib.repr(parameters)}",
    )
    _require(
        isinstance(aliases, dict)
        and all(
            isinstance(name, str) and name not in aliases and alias not in parameters
            for alias, name in aliases.items()
        ),
        f"aliases must map further names of tensors to the first, got {reprlib.repr(aliases)}",
    )
    return Layout({name: tuple(shape) for name, shape in parameters.items()}, aliases)


def _read_entry(where: str, network: Any, before: PathPoint | None) -> Entry:
    """One network of the index.

    Args:
        where: The name of the network in messages.
        network: The value that the JSON holds there.
        before: The network before it, or None if it is the first.
    """
    _require(isinstance(network, dict), f"{where} must be an object, got {reprlib.repr(network)}")
    _require_keys(where, network, {"step", "drift", "length", "sha256", "crc32"})
    step, drift, length = network["step"], network["drift"], network["length"]
    _require(
        _is_count(step, 0) and (step == 0 if before is None else step > before.step),
        f"{where}: step must be 0 first and then a whole number above the last, got {reprlib.repr(step)}",
    )
    _require(
        drift is None or _is_size(drift),
        f"{where}: drift must be null or a finite number, 0 or more, got {reprlib.repr(drift)}",
    )
    _require(
        _is_size(length) and (length == 0 if before is None else length >= before.length),
        f"{where}: length must be 0 first and then a finite number, no less than the last, "
        f"got {reprlib.repr(length)}",
    )
    return Entry(PathPoint(step, drift, length), network["sha256"])


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _require_keys(where: str, found: Mapping[str, Any], keys: set[str]) -> None:
    _require(
        found.keys() == keys, f"{where} must have {sorted(keys)}, got {reprlib.repr(sorted(found))}"
    )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_size(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of an index")
