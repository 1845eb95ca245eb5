"""The networks that a run has visited.

A ``FIPPath`` is recorded while an optimizer steps, in memory or in a folder. Afterwards each network can be loaded
back, several can be combined into an ensemble, and all of them can be drawn.

    with opt.record(every=10, folder="runs/path") as path:
        for x, y in loader:
            ...
            opt.step()
    path.load_into(model, -1)
    members = path.ensemble(model, [0, 5, -1])
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fipoptim.path.arguments import as_folder, as_module, whole_number
from fipoptim.path.components import color_numbers, draw_path, principal_components
from fipoptim.path.ensemble import PathEnsemble
from fipoptim.path.folder import PathFolder
from fipoptim.path.index import Index, PathPoint
from fipoptim.path.networks import Networks
from fipoptim.path.recorder import RecordedOptimizer, Recorder, ranks_of
from fipoptim.path.shared import SharedFolder
from fipoptim.path.snapshot import Layout, check_fit, tensors_of
from fipoptim.path.store import MemoryStore
from fipoptim.shards import is_fully_sharded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FIPPath"]


class FIPPath:
    """Networks sampled along a run of ``FIPOptimizer``; ``FIPOptimizer.record`` makes one.

    As a context manager it records the network that it finds, then the network after every ``every``-th step, and the
    last one when it is left. The parameters and persistent buffers of a network are kept, on the CPU, tied weights
    once; extra state (``nn.Module.get_extra_state``) is not. A path in memory takes the memory of all its networks. A
    path in a folder writes each network there at once (``network-00000.safetensors``, listed in ``index.json``), and
    the process holds about one network, however long the path is. ``FIPPath.open`` reads a folder later.

    A network that cannot be recorded (the disk is full, the folder is gone, a parameter has another shape, a weight
    has become NaN) neither undoes the step before it nor stops the run. A ``RuntimeWarning`` names the cause, later
    networks are tried again, and leaving the ``with`` block raises an error that lists what is missing. If the block
    raises an error of its own, that one is raised, with a note. The networks that were recorded stay whole.

    If several ranks share the anchors, all of them record the path. In memory each keeps its own networks. Rank 0 alone
    writes a folder; the others know steps, drifts and lengths, and asking them for a network raises a
    ``RuntimeError``.

    ``len(path)``, ``path[i]`` (negative too) and iteration give the networks as state dictionaries that
    ``nn.Module.load_state_dict`` takes (with ``strict=False`` if the model has extra state).

    Args:
        optimizer: The optimizer to follow; the network is ``optimizer.anchors.model``.
        every: The number of steps between two recorded networks.
        folder: The folder that the networks are written to, made if needed. None keeps them in memory.

    Raises:
        TypeError: If ``folder`` is not a path.
        ValueError: If ``every`` is not a positive whole number, if ranks give different arguments, or if the model is
            fully sharded.
        FileExistsError: If ``folder`` is a file, or already holds a path.
        ImportError: If a folder is given and safetensors is not installed.
    """

    def __init__(
        self,
        optimizer: RecordedOptimizer,
        *,
        every: int = 1,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        steps = whole_number(every)
        if steps is None or steps < 1:
            raise ValueError(
                f"every: must be a whole number of steps, 1 or more, got {every!r}; "
                "every=10 records each tenth network."
            )
        if is_fully_sharded(optimizer.anchors.model):
            raise ValueError(
                "record: the model is fully sharded, and no rank has a whole network to record. Save checkpoints by "
                "torch.distributed.checkpoint instead."
            )
        ranks = ranks_of(optimizer)
        ranks.refuse_differing(
            {"every": steps, "folder": "none" if folder is None else "given"},
            "Every rank records the path, with the same arguments.",
        )
        self.every = steps
        self.folder: Path | None = None
        nothing = Index(steps, Layout({}, {}))
        if folder is None:
            self._networks = Networks(MemoryStore(), nothing)
        else:
            self.folder = as_folder(folder)
            own = PathFolder(self.folder)
            files = own if ranks.alone else SharedFolder(own, ranks)
            files.prepare()
            self._networks = Networks(files, nothing)
        self._recorder: Recorder | None = Recorder(optimizer, self._networks, steps)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> FIPPath:
        """Read a recorded path from its folder; no optimizer and no model are needed.

        A network is read, and compared with its checksum in the index, when it is asked for.

        Raises:
            TypeError: If ``folder`` is not a path.
            FileNotFoundError: If there is no ``index.json``, or if a network that it lists is missing.
            ValueError: If ``index.json`` is not one that this version writes, or was changed.
            ImportError: If safetensors is not installed.
        """
        self = cls.__new__(cls)
        self.folder = as_folder(folder)
        files = PathFolder(self.folder)
        self._networks = Networks(files, files.read_index())
        self.every = self._networks.index.every
        self._recorder = None
        return self

    # Recording

    def __enter__(self) -> FIPPath:
        if self._recorder is None:
            raise RuntimeError(
                "this path was opened from its folder; call opt.record(...) for a new one."
            )
        self._recorder.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._recorder is not None
        self._recorder.finish(error)

    # Reading

    def __repr__(self) -> str:
        missed = f"; steps {reprlib.repr(self.missed)} could not be recorded" if self.missed else ""
        return (
            f"{type(self).__name__}({len(self)} networks {self._networks.place}, "
            f"length {self.length():.4g}{missed})"
        )

    def __len__(self) -> int:
        return len(self._networks)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """The i-th recorded network as a state dictionary of CPU tensors that are the caller's own.

        Raises:
            TypeError: If ``i`` is not one whole number.
            IndexError: If there is no i-th network.
            FileNotFoundError: If its file is missing.
            ValueError: If its file is not the one that was written.
        """
        state = self._networks[i]
        clones = {id(tensor): tensor.clone() for tensor in state.values()}
        return {name: clones[id(tensor)] for name, tensor in state.items()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))

    @property
    def metadata(self) -> tuple[PathPoint, ...]:
        """Step, drift and path length of every recorded network, in order."""
        return self._networks.points

    @property
    def missed(self) -> list[int]:
        """The steps whose network should have been recorded and could not be. An opened path has none."""
        return [] if self._recorder is None else self._recorder.missed

    @property
    def steps(self) -> list[int]:
        """The step after which each network was recorded, starting with 0."""
        return [point.step for point in self.metadata]

    @property
    def drifts(self) -> list[float | None]:
        """The drift reported with each network; see ``PathPoint.drift``."""
        return [point.drift for point in self.metadata]

    def length(self) -> float:
        """The Euclidean length of the polyline through the recorded networks, over the parameters.

        Buffers do not count. With ``every=1`` and steps of length ``eps`` it is ``eps`` times their number.
        With a larger ``every`` the polyline cuts corners, and is shorter than the steps together.
        """
        return self._networks.length

    def load_into(self, model: nn.Module, i: int) -> None:
        """Copy the i-th recorded network into ``model``, parameters and persistent buffers.

        Values are cast to the dtypes of the model, which may be on any device.

        Raises:
            TypeError: If ``model`` is not a module or ``i`` not one whole number.
            IndexError: If there is no i-th network.
            FileNotFoundError: If the network's file is missing.
            ValueError: If the model's tensors do not have the recorded names, shapes and kinds (float, complex or
                whole numbers), or are on the meta device, or if the network's file was changed. The message names
                them, and the model is as it was.
        """
        model_tensors = tensors_of(as_module(model))
        state = self._networks[i]
        check_fit(model_tensors, state)
        with torch.no_grad():
            for name, tensor in model_tensors.items():
                tensor.copy_(state[name])

    def ensemble(
        self, model: nn.Module, indices: Sequence[int] | None = None, *, dim: int = -1
    ) -> PathEnsemble:
        """The recorded networks ``indices`` (all, if None) as one module; see ``PathEnsemble``."""
        return PathEnsemble(self._networks, model, indices, dim=dim)

    def pca(self, components: int = 2) -> tuple[Tensor, Tensor]:
        """The principal components of the recorded networks in weight space.

        Each file is read twice, once to compare its checksum, and memory does not grow with the number of networks.
        Entries that are the same in all networks do not count, even if they are infinite.

        Args:
            components: How many to return. Those beyond the n networks' span are zero.

        Returns:
            The coordinates of the networks, (n, components) float64, in the units of the weights, each column signed
            so that its entry of largest size is positive; and the share of the variance that each component
            holds, (components,).

        Raises:
            ValueError: If nothing is recorded yet, if ``components`` is not a positive whole number, if the square
                of a difference overflows, or if a network's file was changed.
            FileNotFoundError: If a network's file is missing.
        """
        return principal_components(self._networks, components)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        color: Sequence[float | None] | None = None,
        label: str = "step",
        cmap: str = "viridis",
    ) -> Axes:
        """Draw the path in the plane of its first two principal components.

        Args:
            ax: The axes to draw in; those of a new figure if None.
            color: One number for each network, for instance accuracies along the path, or None for a network that has
                no number (``path.drifts`` may hold some). The steps are taken if ``color`` is None.
            label: The name of the numbers, beside the colour bar.
            cmap: A matplotlib colour map.

        Returns:
            The axes, for titles and ``ax.figure.savefig(...)``.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If nothing is recorded, or if ``color`` does not have one number for each network.
            FileNotFoundError: If a network's file is missing.
        """
        numbers = color_numbers(self.steps if color is None else color, len(self))
        points, shares = self.pca(2)
        return draw_path(points, shares, numbers, ax, label, cmap)
