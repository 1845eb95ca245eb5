"""The networks of one path by index, and how one more is added to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from fipoptim.path.arguments import network_position
from fipoptim.path.index import Entry, Index, PathPoint
from fipoptim.path.snapshot import Layout, distance, layout_changes, snapshot
from fipoptim.path.store import Piece, Store


class Networks:
    """The networks of one path in the order in which they were recorded.

    Only networks that are complete are listed in the index. An error or a KeyboardInterrupt while a network is added
    leaves those before it as they were.

    Args:
        store: Keeps the weights.
        index: The description of the networks that the store holds.
    """

    def __init__(self, store: Store, index: Index) -> None:
        self.index = index
        self._store = store
        self._listed = len(index.entries)  # The number of networks that the stored index lists.
        # The parameters of the last network by its position, to measure the distance of the next one from. While a
        # network is added there may be two: the number of entries tells which is the last.
        self._last_parameters: dict[int, dict[str, Tensor]] = {}

    # Reading

    def __len__(self) -> int:
        return len(self.index.entries)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """The i-th network's tensors under all their names. The caller must neither change nor keep them.

        Raises:
            TypeError: If ``i`` is not one whole number.
            IndexError: If there is no i-th network.
            FileNotFoundError: If its file is missing.
            ValueError: If its file is not the one that was written.
        """
        state = self._store.read_network(network_position(i, len(self)), self.index)
        return self.index.layout.with_aliases(state)

    @property
    def points(self) -> tuple[PathPoint, ...]:
        """Step, drift and path length of every network, in order."""
        return tuple(entry.point for entry in self.index.entries)

    @property
    def length(self) -> float:
        """The Euclidean length of the polyline through the networks, over the parameters."""
        return self.index.entries[-1].point.length if self.index.entries else 0.0

    @property
    def last_step(self) -> int:
        """The step after which the last network was recorded."""
        return self.index.entries[-1].point.step

    @property
    def unlisted(self) -> int:
        """The number of networks that are complete and that the stored index does not list."""
        return len(self) - self._listed

    @property
    def place(self) -> str:
        """The place of the networks in words, such as "in memory"."""
        return self._store.place

    def check(self) -> None:
        """Check that every network is the one that was written.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file was changed.
        """
        for i in range(len(self)):
            self._store.check(i, self.index)

    def read_pieces(self, i: int, pieces: Sequence[Piece]) -> list[Tensor]:
        """Parts of the tensors of the i-th network, unchecked."""
        return self._store.read_pieces(i, pieces)

    # Adding

    def begin(self, model: nn.Module, drift: float | None) -> None:
        """Take ``model`` as the start network, of step 0.

        Raises:
            FileExistsError: If the store holds a path already.
            OSError: If it cannot be written. No network is held then.
        """
        state, layout = snapshot(model)
        every = self.index.every
        try:
            self.index = Index(every, layout)
            self._listed = 0
            self._store.begin(self.index)
            self._append(state, PathPoint(0, drift, 0.0))
        except BaseException:
            self.index = Index(every, Layout({}, {}))
            self._listed = 0
            self._last_parameters = {}
            raise

    def add(self, model: nn.Module, step: int, drift: float | None) -> None:
        """Add ``model`` as it stands after ``step`` steps.

        Raises:
            ValueError: If its architecture is not the recorded one, or its distance from the last one is not finite.
            OSError: If it cannot be written.
        """
        state, layout = snapshot(model)
        changes = layout_changes(self.index.layout, layout)
        if changes:
            raise ValueError(
                f"model: is not of the architecture that was recorded first: {'; '.join(changes)}"
            )
        moved = distance(state, self._last_parameters[len(self) - 1], layout)
        length = self.length + moved
        if not math.isfinite(length):
            raise ValueError(
                f"model: its weights are {moved} away from those of step {self.last_step}; "
                "a weight has become NaN or infinite"
            )
        self._append(state, PathPoint(step, drift, length))

    def write_index(self) -> None:
        """List all networks in the stored index.

        Raises:
            OSError: If it cannot be written.
        """
        self._store.write_index(self.index)
        self._listed = len(self)

    def finish(self) -> None:
        """Release what only the next network would need."""
        self._last_parameters = {}

    def _append(self, state: dict[str, Tensor], point: PathPoint) -> None:
        i = len(self)
        sha256 = self._store.write_network(i, state)
        self._last_parameters[i] = {name: state[name] for name in self.index.layout.parameters}
        self.index.entries.append(Entry(point, sha256))
        self._last_parameters = {i: self._last_parameters[i]}
        self.write_index()
