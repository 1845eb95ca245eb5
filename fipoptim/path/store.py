"""A store keeps the weights of a path: the methods of every store, and the store that keeps them in memory.

``fipoptim.path.folder.PathFolder`` is the store that keeps them on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from fipoptim.path.index import Index

# A part of a tensor: its name, and a slice along its first dimension. A scalar is always taken whole.
Piece = tuple[str, slice]


class Store(Protocol):
    """Keeps the weights of the networks of one path.

    A network is written first and listed in the index afterwards. Tied tensors are written once.
    """

    @property
    def place(self) -> str:
        """The place of the networks in words, such as "in memory"."""

    def begin(self, index: Index) -> None:
        """Get ready for a path whose ``index`` lists nothing yet."""

    def write_network(self, i: int, state: Mapping[str, Tensor]) -> str:
        """Keep the i-th network, and return the SHA-256 of its file, or "" if there is no file."""

    def write_index(self, index: Index) -> None:
        """Keep the index, whose networks are written."""

    def check(self, i: int, index: Index) -> None:
        """Check that the i-th network is the one that was written, or raise a ValueError or FileNotFoundError."""

    def read_network(self, i: int, index: Index) -> dict[str, Tensor]:
        """The tensors of the i-th network, checked. The caller must neither change nor keep them."""

    def read_pieces(self, i: int, pieces: Sequence[Piece]) -> list[Tensor]:
        """Parts of the tensors of the i-th network, unchecked."""


class MemoryStore:
    """Keeps the networks of a path in the memory of this process."""

    def __init__(self) -> None:
        self._states: list[Mapping[str, Tensor]] = []

    @property
    def place(self) -> str:
        """The place of the networks in words."""
        return "in memory"

    def begin(self, index: Index) -> None:
        """Remove all networks."""
        self._states = []

    def write_network(self, i: int, state: Mapping[str, Tensor]) -> str:
        """Keep ``state`` itself as the i-th network, in place of an i-th one that was not listed."""
        self._states[i:] = [state]
        return ""

    def write_index(self, index: Index) -> None:
        """Do nothing: the index of a path in memory is the one that the path holds."""

    def check(self, i: int, index: Index) -> None:
        """Do nothing: memory is trusted."""

    def read_network(self, i: int, index: Index) -> dict[str, Tensor]:
        """The tensors of the i-th network themselves."""
        return dict(self._states[i])

    def read_pieces(self, i: int, pieces: Sequence[Piece]) -> list[Tensor]:
        """Views of parts of the tensors of the i-th network."""
        state = self._states[i]
        return [state[name][part] if state[name].ndim else state[name] for name, part in pieces]
