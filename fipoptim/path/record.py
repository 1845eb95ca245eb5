"""What was visited on the way: the networks sampled along a run.

A ``FIPPath`` is recorded while an optimizer steps, in memory or in a folder, and read afterwards: every
network can be loaded back, a few of them make an ensemble, and all of them together can be drawn.

    with opt.record(every=10, folder="runs/path") as path:
        for x, y in loader:
            ...
            opt.step()
    path.load_into(model, -1)
    members = path.ensemble(model, [0, 5, -1])
"""

from __future__ import annotations

import contextlib
import copy
import math
import operator
import os
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fipoptim.anchors.evaluation import unwrap
from fipoptim.anchors.output_space import read_logits
from fipoptim.path.store import Entry, Layout, PathFolder, PathPoint, import_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.optim.optimizer import Optimizer
    from torch.utils.hooks import RemovableHandle

    from fipoptim.optimizer import FIPOptimizer

__all__ = ["FIPPath", "PathEnsemble", "PathPoint"]

# Bytes of weights held at once by the principal components; one double for each network and coordinate.
_PCA_BYTES = 128 * 2**20


class FIPPath:
    """Networks sampled along a run of ``FIPOptimizer``; made by ``FIPOptimizer.record``.

    As a context manager it records the network it finds, then the one after every ``every``-th step, and on
    leaving the last one. What is kept of a network are its parameters and persistent buffers, on the CPU, tied
    weights once; extra state (``nn.Module.get_extra_state``) is not. In memory a path costs one network for each
    one recorded; with a folder each is written there as it comes (``network-00000.safetensors``, with
    ``index.json`` beside them) and the process holds about one, however long the path. A folder can be read later
    with ``FIPPath.open``.

    A network that cannot be recorded (the disk is full, the folder is gone, a parameter has another shape, a weight
    has become NaN) does not undo the step it comes after, and does not stop the run: a ``RuntimeWarning`` names the
    cause, the next networks are tried again, and leaving the ``with`` block raises an error that lists what is
    missing. If the block raises an error of its own, that one is raised, with a note. What was recorded stays whole.

    ``len(path)``, ``path[i]`` (negative too) and iteration give the networks as state dictionaries that
    ``nn.Module.load_state_dict`` takes (with ``strict=False`` if the model has extra state).

    Args:
        optimizer: The optimizer to follow; the network is ``optimizer.anchors.model``.
        every: Record after every this many steps.
        folder: Where to write the networks, made if needed; None keeps them in memory.

    Raises:
        TypeError: If ``folder`` is not a path.
        ValueError: If ``every`` is not a positive whole number.
        FileExistsError: If ``folder`` already holds a path.
        ImportError: If a folder is given and safetensors is not installed.
    """

    def __init__(
        self,
        optimizer: FIPOptimizer,
        *,
        every: int = 1,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        steps = _whole(every)
        if steps is None or steps < 1:
            raise ValueError(
                f"every: must be a whole number of steps, 1 or more, got {every!r}; "
                "every=10 records each tenth network."
            )
        self.every = steps
        self.folder = None if folder is None else _folder(folder)
        self._files: PathFolder | None = None
        if self.folder is not None:
            self._files = PathFolder(self.folder)
            self._files.prepare()
        self._optimizer: FIPOptimizer | None = optimizer
        self._hook: RemovableHandle | None = None
        self._forget()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> FIPPath:
        """Read a recorded path from its folder; no optimizer and no model are needed.

        The networks themselves are read, and compared with their checksums in the index, when they are asked for.

        Raises:
            TypeError: If ``folder`` is not a path.
            FileNotFoundError: If there is no ``index.json``, or a network that it lists is missing.
            ValueError: If ``index.json`` is not one that this version writes, or was changed.
            ImportError: If safetensors is not installed.
        """
        self = cls.__new__(cls)
        self.folder = _folder(folder)
        self._files = PathFolder(self.folder)
        self._optimizer = self._hook = None
        self._forget()
        self.every, self._layout, self._entries = self._files.read_index()
        self._step = self._entries[-1].point.step if self._entries else 0
        return self

    def _forget(self) -> None:
        """The state of a path on which nothing is recorded."""
        self._step = 0
        self._layout = Layout({}, {})
        self._entries: list[Entry] = []  # the networks that are whole
        self._listed = 0  # how many of them the index in the folder lists
        self._states: list[dict[str, Tensor]] = []  # the networks, if there is no folder
        self._last: dict[int, dict[str, Tensor]] = {}  # parameters by network, to measure from
        self._missed: set[int] = set()
        self._failure: Exception | None = None  # the first

    # Recording

    def __enter__(self) -> FIPPath:
        if self._optimizer is None or self._hook is not None:
            raise RuntimeError(
                "this path is recorded already, or being recorded; call opt.record(...) for a new one."
            )
        anchors = self._optimizer.anchors
        drift = getattr(anchors, "drift", None)
        reported = None if drift is None else _size(drift())
        try:
            state, self._layout = _snapshot(anchors.model)
            if self._files is not None:
                self._files.begin(self.every, self._layout)
            self._keep(state, reported, 0.0)
        except BaseException:
            self._forget()
            raise
        self._hook = self._optimizer.register_step_post_hook(self._after_step)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._hook is not None
        self._hook.remove()
        try:
            if self._entries[-1].point.step != self._step:
                self._try(self._record)
            elif self._files is not None and self._listed < len(self._entries):
                self._try(self._write_index)
        finally:
            self._hook = self._optimizer = None
            self._last = {}
        shortfall = self._shortfall()
        if shortfall is None:
            return
        if error is not None:
            error.add_note(shortfall)
            return
        cause = self._failure
        if isinstance(cause, OSError):
            numbered = () if cause.errno is None else (cause.errno,)
            raise OSError(*numbered, shortfall) from cause
        raise RuntimeError(shortfall) from cause

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._step += 1
        if self._step % self.every == 0:
            failed_before = self._failure is not None
            error = self._try(self._record)
            if error is not None and not failed_before:
                self._warn(error)

    def _try(self, write: Callable[[], None]) -> Exception | None:
        """What went wrong with ``write``, which is taken down, or None."""
        try:
            write()
        except Exception as error:
            # Without its frames, which would hold the network that was not recorded.
            error.__cause__ = error.__context__ = None
            self._failure = self._failure or error.with_traceback(None)
            return error
        finally:
            if self._entries[-1].point.step == self._step:
                self._missed.discard(self._step)
            else:
                self._missed.add(self._step)
        if not self._missed:
            self._failure = None
        return None

    def _warn(self, error: Exception) -> None:
        # An error raised here would leave the caller with a step that failed and weights that moved. Filters that
        # make errors of warnings are not obeyed, therefore; the error comes on leaving.
        with contextlib.suppress(RuntimeWarning):
            warnings.warn(
                f"path: the network of step {self._step} could not be recorded {self._where()} "
                f"({type(error).__name__}: {error}). The step is taken and the run goes on; the next networks are "
                "tried again without a further warning, and leaving the recording raises an error if any is missing.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _shortfall(self) -> str | None:
        """What could not be recorded, in words, or None if all is there."""
        unlisted = 0 if self._files is None else len(self._entries) - self._listed
        if not self._missed and not unlisted:
            return None
        parts = []
        if self._missed:
            parts.append(f"the networks of steps {self._shown_missed()} could not be recorded")
        if unlisted:
            parts.append(f"the last {unlisted} networks could not be listed in the index")
        cause = self._failure
        because = "" if cause is None else f" ({type(cause).__name__}: {cause})"
        there = len(self) - unlisted
        return f"path: {' and '.join(parts)} {self._where()}{because}. The other {there} are whole."

    def _record(self) -> None:
        """Record the network as it stands, after ``self._step`` steps.

        Raises:
            ValueError: If it is not of the recorded ones' architecture, or not a finite distance away.
            OSError: If it cannot be written.
        """
        assert self._optimizer is not None
        state, layout = _snapshot(self._optimizer.anchors.model)
        changes = _changes(self._layout, layout)
        if changes:
            raise ValueError(
                f"model: is not of the architecture that was recorded first: {'; '.join(changes)}"
            )
        moved = _distance(state, self._last[len(self) - 1], list(layout.parameters))
        length = self.length() + moved
        if not math.isfinite(length):
            raise ValueError(
                f"model: its weights are {moved} away from those of step {self.steps[-1]}; "
                "a weight has become NaN or infinite"
            )
        drift = getattr(getattr(self._optimizer, "last_step", None), "drift", None)
        self._keep(state, _size(drift), length)

    def _keep(self, state: dict[str, Tensor], drift: float | None, length: float) -> None:
        """Add a network to the path: its weights first, then its entry, then the index on disk.

        An interruption at any point leaves the networks of ``self._entries`` whole.
        """
        i = len(self._entries)
        sha256 = ""
        if self._files is None:
            self._states[i:] = [state]
        else:
            sha256 = self._files.write_network(i, state)
        self._last[i] = {name: state[name] for name in self._layout.parameters}
        self._entries.append(Entry(PathPoint(self._step, drift, length), sha256))
        self._last = {i: self._last[i]}
        if self._files is not None:
            self._write_index()

    def _write_index(self) -> None:
        assert self._files is not None
        self._files.write_index(self.every, self._layout, self._entries)
        self._listed = len(self._entries)

    # Reading

    def __repr__(self) -> str:
        missed = f"; steps {self._shown_missed()} could not be recorded" if self._missed else ""
        return (
            f"{type(self).__name__}({len(self)} networks {self._where()}, "
            f"length {self.length():.4g}{missed})"
        )

    def _where(self) -> str:
        return "in memory" if self.folder is None else f"in {str(self.folder)!r}"

    def _shown_missed(self) -> str:
        return reprlib.repr(self.missed)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """The i-th recorded network as a state dictionary of CPU tensors that are the caller's own.

        Raises:
            TypeError: If ``i`` is not one whole number.
            IndexError: If there is no i-th network.
            FileNotFoundError: If its file is missing.
            ValueError: If its file is not the one that was written.
        """
        state = self._read(self._position(i))
        return self._with_aliases({name: tensor.clone() for name, tensor in state.items()})

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))

    def _read(self, i: int) -> dict[str, Tensor]:
        """The i-th network's tensors, once each, which are not the caller's to change or to keep."""
        if self._files is None:
            return self._states[i]
        return self._files.read_network(i, self._layout, self._entries[i])

    def _with_aliases(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tied tensors under all their names, as one object each: what functional_call asks for."""
        return state | {alias: state[name] for alias, name in self._layout.aliases.items()}

    def _position(self, i: int) -> int:
        position = _whole(i)
        if position is None:
            raise TypeError(
                f"index: must be one whole number, got {i!r}; "
                "for several networks: (path[i] for i in range(...))."
            )
        if not -len(self) <= position < len(self):
            raise IndexError(f"index: {i} is outside the path, which has {len(self)} networks.")
        return position % len(self)

    @property
    def metadata(self) -> tuple[PathPoint, ...]:
        """Step, drift and path length of every recorded network, in order."""
        return tuple(entry.point for entry in self._entries)

    @property
    def missed(self) -> list[int]:
        """The steps of which the network was to be recorded and could not be; of a path that is opened, none."""
        return sorted(self._missed)

    @property
    def steps(self) -> list[int]:
        """The step after which each network was recorded, starting with 0."""
        return [entry.point.step for entry in self._entries]

    @property
    def drifts(self) -> list[float | None]:
        """The drift reported with each network; see ``PathPoint.drift``."""
        return [entry.point.drift for entry in self._entries]

    def length(self) -> float:
        """Euclidean length of the polyline through the recorded networks, over the parameters.

        Buffers do not count. With ``every=1`` and steps of length ``eps`` it is ``eps`` times their number;
        with a larger ``every`` the polyline cuts corners and is shorter than the way the steps took.
        """
        return self._entries[-1].point.length if self._entries else 0.0

    def load_into(self, model: nn.Module, i: int) -> None:
        """Copy the i-th recorded network into ``model``, parameters and persistent buffers.

        Values are cast to the dtypes of the model, which may be on any device.

        Raises:
            TypeError: If ``model`` is not a module or ``i`` not one whole number.
            IndexError: If there is no i-th network.
            ValueError: If the model's tensors are not the recorded ones by name, shape and kind (float, complex or
                whole numbers), or have no memory yet (the meta device), or if the network's file was changed. The
                message names them, and the model is as it was.
        """
        own = _tensors(_module(model))
        state = self._with_aliases(self._read(self._position(i)))
        _check_fit(own, state)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def ensemble(
        self, model: nn.Module, indices: Sequence[int] | None = None, *, dim: int = -1
    ) -> PathEnsemble:
        """The recorded networks ``indices`` (all, if None) as one module; see ``PathEnsemble``."""
        return PathEnsemble(self, model, indices, dim=dim)

    def pca(self, components: int = 2) -> tuple[Tensor, Tensor]:
        """Principal components of the recorded networks in weight space.

        From the n × n Gram matrix of the centred parameters, which is summed over slices of coordinates:
        each file is read twice in all, once to compare its checksum, and memory does not grow with the number of
        networks. Entries that are the same in all networks do not count, infinite ones either.

        Args:
            components: How many to return; those beyond the n networks' span are zero.

        Returns:
            Coordinates of the networks, (n, components) float64, in the units of the weights, each column
            signed so that its largest entry is positive; and the share of the variance that each component
            holds, (components,).

        Raises:
            ValueError: If nothing is recorded yet, if ``components`` is not a positive whole number, if the square
                of a difference overflows, or if a network's file was changed.
            FileNotFoundError: If a network's file is missing.
        """
        n = len(self)
        if n == 0:
            raise ValueError(
                "the path holds no network yet; record one with ``with opt.record(...) as path:``."
            )
        count = _whole(components)
        if count is None or count < 1:
            raise ValueError(f"components: must be a whole number, 1 or more, got {components!r}.")
        if self._files is not None:
            for i, entry in enumerate(self._entries):
                self._files.check(i, self._layout, entry)
        gram = torch.zeros(n, n, dtype=torch.float64, device="cpu")
        for block in self._blocks(max(1, _PCA_BYTES // (8 * n))):
            block = _difference(block, block[:1])
            block -= block.mean(0)
            gram.addmm_(block, block.T)
        if not bool(torch.isfinite(gram).all()):
            raise ValueError(
                "path: the networks are too far apart for the squares of their distances to be numbers."
            )
        values, vectors = torch.linalg.eigh(gram)
        kept = min(count, n)
        values = values.flip(0)[:kept].clamp(min=0)
        coordinates = vectors.flip(1)[:, :kept] * values.sqrt()
        largest = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True))
        coordinates = coordinates * torch.where(largest < 0, -1.0, 1.0)
        total = float(gram.trace())
        shares = values / total if total > 0 else torch.zeros_like(values)
        missing = count - kept
        return (
            nn.functional.pad(coordinates, (0, missing)),
            nn.functional.pad(shares, (0, missing)),
        )

    def _blocks(self, width: int) -> Iterator[Tensor]:
        """The parameters of all networks, (n, about ``width`` coordinates) float64 at a time."""
        pieces: list[tuple[str, slice]] = []
        size = 0
        for name, shape in self._layout.parameters.items():
            rows = shape[0] if shape else 1
            row = max(1, math.prod(shape) // max(1, rows))
            start = 0
            while start < rows:
                # A tensor is cut along its first dimension, at least one row at a time.
                stop = min(rows, start + max(1, (width - size) // row))
                if pieces and size + (stop - start) * row > width:
                    yield self._block(pieces)
                    pieces, size = [], 0
                    continue
                pieces.append((name, slice(start, stop)))
                size += (stop - start) * row
                start = stop
        if pieces:
            yield self._block(pieces)

    def _block(self, pieces: list[tuple[str, slice]]) -> Tensor:
        block: Tensor | None = None
        for i in range(len(self)):
            if self._files is None:
                state = self._states[i]
                parts = [
                    state[name][part] if state[name].ndim else state[name] for name, part in pieces
                ]
            else:
                with self._files.slices(i) as stored:
                    parts = [_read_slice(stored, name, part) for name, part in pieces]
            row = torch.cat([_numbers(part) for part in parts])
            if block is None:
                block = row.new_empty(len(self), len(row))
            block[i] = row
        assert block is not None
        return block

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
            ax: Where to draw; a new figure if None.
            color: One number for each network, for instance accuracies along the path, or None where there is
                none (``path.drifts`` may hold some); their steps if None.
            label: What the numbers are, beside the colour bar.
            cmap: A matplotlib colour map.

        Returns:
            The axes, for titles and ``ax.figure.savefig(...)``.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If nothing is recorded, or ``color`` has not one number for each network.
        """
        try:
            shown = [
                math.nan if c is None else float(c)
                for c in (self.steps if color is None else color)
            ]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"color: must hold one number for each network, got {reprlib.repr(color)}."
            ) from error
        if len(shown) != len(self):
            raise ValueError(
                f"color: must hold one number for each of the {len(self)} networks, got {len(shown)}."
            )
        points, shares = self.pca(2)
        if ax is None:
            ax = import_for("draw a path", "matplotlib.pyplot").subplots()[1]
            assert ax is not None
        x, y = points[:, 0].tolist(), points[:, 1].tolist()
        ax.plot(x, y, color="0.7", linewidth=1, zorder=1)
        marks = ax.scatter(x, y, c=shown, cmap=cmap, s=18, zorder=2)
        ax.scatter(
            x[:1], y[:1], marker="s", facecolor="none", edgecolor="black", s=60, label="start"
        )
        ax.scatter(
            x[-1:], y[-1:], marker="*", facecolor="none", edgecolor="black", s=110, label="end"
        )
        ax.figure.colorbar(marks, ax=ax, label=label)
        ax.set_xlabel(f"component 1 ({float(shares[0]):.0%} of the variance)")
        ax.set_ylabel(f"component 2 ({float(shares[1]):.0%})")
        ax.legend(frameon=False)
        return ax


class PathEnsemble(nn.Module):
    """Networks of a path as one module: the sum of the softmax of their outputs.

    The sum (over k members it adds up to k) is that of the paper's adversarial ensembles. Members run in
    eval mode, whatever the mode of the ensemble, and are loaded one at a time, so without autograd memory
    does not grow with their number. Gradients flow to the inputs, not to the members' weights; the graph
    then holds every member. ``model`` gives the architecture only: it is copied, and never changed.

    Args:
        path: Where the members' weights come from.
        model: A network of the same architecture; its device is where the ensemble runs, ``.to(...)`` moves it.
        indices: Which networks, negative indices too; all of them if None. One index may be given twice.
        dim: The dimension of the classes in the model's output.

    Raises:
        TypeError: If ``model`` is not a module, ``indices`` are not whole numbers or ``dim`` is not one.
        ValueError: If ``indices`` is empty, or the recorded networks do not fit ``model``; also when it is called, and
            then if a network's file was changed.
        IndexError: If an index is outside the path; when called, if the outputs have no dimension ``dim``.
    """

    def __init__(
        self,
        path: FIPPath,
        model: nn.Module,
        indices: Sequence[int] | None = None,
        *,
        dim: int = -1,
    ) -> None:
        super().__init__()
        own = _module(model)
        if indices is not None and not isinstance(indices, Iterable):
            raise TypeError(
                f"indices: must be several whole numbers, got {indices!r}; [0, -1] are the first and the last."
            )
        chosen = range(len(path)) if indices is None else indices
        self.indices = tuple(path._position(i) for i in chosen)
        if not self.indices:
            raise ValueError("indices: is empty; an ensemble needs at least one recorded network.")
        dimension = _whole(dim)
        if dimension is None:
            raise TypeError(f"dim: must be a whole number, got {dim!r}.")
        self.dim = dimension
        self._path = path
        self.model = copy.deepcopy(own).requires_grad_(False).eval()
        self.model.zero_grad()
        self._member(self.indices[0])

    def __len__(self) -> int:
        return len(self.indices)

    def train(self, mode: bool = True) -> PathEnsemble:
        """Set the flag of the ensemble itself; its members stay in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """Sum over the members of softmax(model(...)), in at least float32."""
        total: Tensor | None = None
        for i in self.indices:
            logits = read_logits(functional_call(self.model, self._member(i), inputs, keywords))
            if not -logits.dim() <= self.dim < logits.dim():
                raise IndexError(
                    f"dim: the model's outputs, {tuple(logits.shape)}, have no dimension {self.dim}."
                )
            shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(self.dim)
            total = shares if total is None else total + shares
        assert total is not None
        return total

    def _member(self, i: int) -> dict[str, Tensor]:
        """The i-th network's tensors as the model has them, for this call's own: a forward may write to buffers."""
        own = _tensors(self.model)
        state = self._path._read(i)
        _check_fit(own, self._path._with_aliases(state))
        return self._path._with_aliases(
            {name: tensor.to(own[name], copy=True) for name, tensor in state.items()}
        )


def _whole(value: Any) -> int | None:
    """``value`` as an int if it is a whole number of any library, but no bool; else None."""
    try:
        number = operator.index(value)
    except TypeError:
        return None
    return (
        None if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool else number
    )


def _size(drift: Any) -> float | None:
    """``drift`` as a finite number of 0 or more, or None."""
    size = math.nan if drift is None else float(drift)
    return size if 0 <= size < math.inf else None


def _folder(folder: Any) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or isinstance(os.fspath(folder), bytes):
        raise TypeError(f"folder: must be a path, a str or os.PathLike, got {folder!r}.")
    return Path(folder)


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module, got {type(model).__name__}.")
    return unwrap(model)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers themselves, by every name they have."""
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    persistent = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in persistent:
            own[name] = buffer
    return own


def _snapshot(model: nn.Module) -> tuple[dict[str, Tensor], Layout]:
    """CPU copies of the model's tensors, tied ones once, and their layout."""
    state: dict[str, Tensor] = {}
    first_names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    parameters: dict[str, tuple[int, ...]] = {}
    for name, tensor in _tensors(model).items():
        if id(tensor) in first_names:
            aliases[name] = first_names[id(tensor)]
            continue
        first_names[id(tensor)] = name
        # Contiguous whatever the memory format, since that is how safetensors stores it.
        kept = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        state[name] = kept
        if isinstance(tensor, nn.Parameter):
            parameters[name] = tuple(tensor.shape)
    return state, Layout(parameters, aliases)


def _changes(before: Layout, now: Layout) -> list[str]:
    """What is different between two layouts, in words."""

    def described(layout: Layout) -> dict[str, str]:
        tied = {alias: f"tied to {name}" for alias, name in layout.aliases.items()}
        return {name: str(shape) for name, shape in layout.parameters.items()} | tied

    was, is_now = described(before), described(now)
    return [
        f"{name} was {was.get(name, 'no parameter')} and is {is_now.get(name, 'none any more')}"
        for name in was | is_now
        if was.get(name) != is_now.get(name)
    ]


def _numbers(tensor: Tensor) -> Tensor:
    """The entries as float64, flat; the real and imaginary parts of complex ones."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.reshape(-1).double()


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """The difference a − b, zero where they are alike: infinite entries too, as those of a mask that is a parameter."""
    alike = (a == b) | (a.isnan() & b.isnan())
    return (a - b).masked_fill_(alike, 0.0)


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Sequence[str]) -> float:
    parts = [
        torch.linalg.vector_norm(_difference(_numbers(a[name]), _numbers(b[name])))
        for name in names
    ]
    return float(torch.linalg.vector_norm(torch.stack(parts))) if parts else 0.0


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is not in the path" for name in own if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(own[name].shape)} in the model and {tuple(state[name].shape)} in the path"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    problems += [
        f"{name} is {own[name].dtype} in the model and {state[name].dtype} in the path"
        for name in own
        if name in state and _kind(own[name]) != _kind(state[name])
    ]
    problems += [f"{name} is on the meta device" for name in own if own[name].is_meta]
    first_names: dict[int, str] = {}
    for name, tensor in own.items():
        first = first_names.setdefault(id(tensor), name)
        if {first, name} <= state.keys() and state[first] is not state[name]:
            problems.append(f"{first} and {name} are one tensor in the model and two in the path")
    if problems:
        raise ValueError(
            "model: is not of the architecture that was recorded: "
            + "; ".join(problems)
            + ". Give a model built as the recorded one was."
        )


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "float" if tensor.is_floating_point() else "whole"


def _read_slice(stored: Any, name: str, part: slice) -> Tensor:
    whole = stored.get_slice(name)
    tensor: Tensor = whole[part] if whole.get_shape() else stored.get_tensor(name)
    return tensor
