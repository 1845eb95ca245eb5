"""The store of a path that several ranks record into one folder: rank 0 writes, and the others follow.

What rank 0 finds is told to all. So a full disk, or a folder that holds a path already, is one error on every rank, and
all of them miss the same networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from torch import Tensor

from fipoptim.path.folder import PathFolder
from fipoptim.path.index import Index
from fipoptim.path.store import Piece
from fipoptim.ranks import Ranks


class SharedFolder:
    """A folder whose networks rank 0 alone writes and reads. It is a ``fipoptim.path.store.Store``.

    Whatever writes is a collective: all ranks have to call it. What reads is not.

    Args:
        folder: The folder.
        ranks: The ranks that record the path.
    """

    def __init__(self, folder: PathFolder, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks

    @property
    def place(self) -> str:
        """The place of the networks in words."""
        return self._folder.place

    def prepare(self) -> None:
        """Make the folder; see :meth:`PathFolder.prepare`."""
        self._ranks.done_by_first(self._folder.prepare)

    def begin(self, index: Index) -> None:
        """Write an index that lists no network; see :meth:`PathFolder.begin`."""
        self._ranks.done_by_first(lambda: self._folder.begin(index))

    def write_network(self, i: int, state: Mapping[str, Tensor]) -> str:
        """Write the i-th network as it is on rank 0, and return the SHA-256 of its file."""
        return self._ranks.done_by_first(lambda: self._folder.write_network(i, state))

    def write_index(self, index: Index) -> None:
        """Write the index; see :meth:`PathFolder.write_index`."""
        self._ranks.done_by_first(lambda: self._folder.write_index(index))

    def check(self, i: int, index: Index) -> None:
        """Check the i-th network.

        Raises:
            RuntimeError: On another rank than 0.
        """
        self._own().check(i, index)

    def read_network(self, i: int, index: Index) -> dict[str, Tensor]:
        """The tensors of the i-th network.

        Raises:
            RuntimeError: On another rank than 0.
        """
        return self._own().read_network(i, index)

    def read_pieces(self, i: int, pieces: Sequence[Piece]) -> list[Tensor]:
        """Parts of the tensors of the i-th network, unchecked.

        Raises:
            RuntimeError: On another rank than 0.
        """
        return self._own().read_pieces(i, pieces)

    def _own(self) -> PathFolder:
        return self._folder if self._ranks.rank == 0 else self._refuse()

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            f"path: rank 0 has written its networks {self.place}, and rank {self._ranks.rank} has none of them. Read "
            "them on rank 0; or open the folder with FIPPath.open(folder), if this rank sees it."
        )
