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

import copy
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fipoptim.anchors import unwrap
from fipoptim.output_space import read_logits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.optim.optimizer import Optimizer
    from torch.utils.hooks import RemovableHandle

    from fipoptim.optimizer import FIPOptimizer

__all__ = ["FIPPath", "PathEnsemble", "PathPoint"]

_INDEX = "index.json"
_FORMAT = {"format": "fipoptim-path", "version": 1}
# Bytes of weights held at once by the principal components; one double for each network and coordinate.
_PCA_BYTES = 128 * 2**20


@dataclass(frozen=True)
class PathPoint:
    """What is known of one recorded network beside its weights.

    Attributes:
        step: Optimizer steps taken since the recording began; 0 is the start network.
        drift: The drift in output space that the optimizer reported with that step (for the start
            network, of the anchors as they stood), or None where it reported none.
        length: Euclidean length of the polyline through the recorded networks up to this one, over the
            parameters, in the units of the weights.
    """

    step: int
    drift: float | None
    length: float


class FIPPath:
    """Networks sampled along a run of ``FIPOptimizer``; made by ``FIPOptimizer.record``.

    As a context manager it records the network it finds, then the one after every ``every``-th step, and on
    leaving the last one. What is kept of a network is its ``state_dict`` (parameters and persistent buffers),
    on the CPU, tied weights once. In memory a path costs one network for each one recorded; with a folder
    each is written there as it comes (``network-00000.safetensors``, with ``index.json`` beside them) and the
    process holds about one, however long the path. A folder can be read later with ``FIPPath.open``.

    ``len(path)``, ``path[i]`` (negative too) and iteration give the networks as state dictionaries that
    ``nn.Module.load_state_dict`` takes.

    Args:
        optimizer: The optimizer to follow; the network is ``optimizer.anchors.model``.
        every: Record after every this many steps.
        folder: Where to write the networks, made if needed; None keeps them in memory.

    Raises:
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
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                f"every: must be a whole number of steps, 1 or more, got {every!r}; "
                "every=10 records each tenth network."
            )
        self.every = every
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            _safetensors()
            _refuse_a_path_in(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        self._optimizer: FIPOptimizer | None = optimizer
        self._hook: RemovableHandle | None = None
        self._step = 0
        self._points: list[PathPoint] = []
        self._states: list[dict[str, Tensor]] = []  # the networks, where there is no folder
        self._last: dict[str, Tensor] = {}  # the parameters of the last one, to measure from
        self._parameters: list[str] = []
        self._aliases: dict[
            str, str
        ] = {}  # second names of tied tensors -> the name they are kept under

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> FIPPath:
        """Read a recorded path from its folder; no optimizer and no model are needed.

        Raises:
            FileNotFoundError: If there is no ``index.json``, or a network that it lists is missing.
            ValueError: If ``index.json`` is not one that this version writes.
            ImportError: If safetensors is not installed.
        """
        _safetensors()
        self = cls.__new__(cls)
        self.folder = Path(folder)
        if not (self.folder / _INDEX).is_file():
            raise FileNotFoundError(
                f"folder: {str(self.folder)!r} holds no recorded path (no {_INDEX} in it). "
                "Give the folder that was given to opt.record(folder=...)."
            )
        try:
            index = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))
            found = {key: index[key] for key in _FORMAT}
            self.every = int(index["every"])
            self._parameters = list(index["parameters"])
            self._aliases = dict(index["aliases"])
            self._points = [PathPoint(**point) for point in index["networks"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"folder: {self.folder / _INDEX} is not the index of a recorded path ({error!r})."
            ) from error
        if found != _FORMAT:
            raise ValueError(
                f"folder: {self.folder / _INDEX} says {found}; this version of fipoptim reads {_FORMAT}."
            )
        for i in range(len(self._points)):
            if not self._file(i).is_file():
                raise FileNotFoundError(
                    f"folder: {self._file(i)} is listed in {_INDEX} and is not there; restore it."
                )
        self._optimizer = None
        self._hook = None
        self._step = self._points[-1].step if self._points else 0
        self._states = []
        self._last = {}
        return self

    # Recording

    def __enter__(self) -> FIPPath:
        if self._optimizer is None or self._hook is not None:
            raise RuntimeError(
                "this path is recorded already, or being recorded; call opt.record(...) for a new one."
            )
        if self.folder is not None:
            _refuse_a_path_in(self.folder)
        anchors = self._optimizer.anchors
        drift = getattr(anchors, "drift", None)
        self._record(None if drift is None else float(drift()))
        self._hook = self._optimizer.register_step_post_hook(self._after_step)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._hook is not None
        self._hook.remove()
        try:
            if self._points[-1].step != self._step:
                self._record(self._reported_drift())
        finally:
            self._hook = self._optimizer = None
            self._last = {}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._step += 1
        if self._step % self.every == 0:
            self._record(self._reported_drift())

    def _reported_drift(self) -> float | None:
        drift = getattr(getattr(self._optimizer, "last_step", None), "drift", None)
        return None if drift is None else float(drift)

    def _record(self, drift: float | None) -> None:
        assert self._optimizer is not None
        state, aliases, parameters = _snapshot(self._optimizer.anchors.model)
        if not self._points:
            self._aliases, self._parameters = aliases, parameters
            length = 0.0
        else:
            length = self._points[-1].length + _distance(state, self._last, self._parameters)
        i = len(self._points)
        if self.folder is None:
            self._states.append(state)
        else:
            _write(self._file(i), lambda file: _safetensors().save_file(state, file))
        self._last = {name: state[name] for name in self._parameters}
        self._points.append(PathPoint(self._step, drift, length))
        if self.folder is not None:
            self._write_index()

    def _file(self, i: int) -> Path:
        assert self.folder is not None
        return self.folder / f"network-{i:05d}.safetensors"

    def _write_index(self) -> None:
        assert self.folder is not None
        index = {
            **_FORMAT,
            "every": self.every,
            "parameters": self._parameters,
            "aliases": self._aliases,
            "networks": [asdict(point) for point in self._points],
        }
        text = json.dumps(index, indent=1) + "\n"
        _write(self.folder / _INDEX, lambda file: file.write_text(text, encoding="utf-8"))

    # Reading

    def __repr__(self) -> str:
        where = "in memory" if self.folder is None else f"in {str(self.folder)!r}"
        return f"{type(self).__name__}({len(self)} networks {where}, length {self.length():.4g})"

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """The i-th recorded network as a state dictionary of CPU tensors that are the caller's own."""
        return self._with_aliases(self._read(self._position(i)))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))

    def _read(self, i: int) -> dict[str, Tensor]:
        if self.folder is None:
            return {name: tensor.clone() for name, tensor in self._states[i].items()}
        state: dict[str, Tensor] = _safetensors().load_file(self._file(i))
        return state

    def _with_aliases(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tied tensors under all their names, as one object each: what functional_call asks for."""
        return state | {alias: state[name] for alias, name in self._aliases.items()}

    def _position(self, i: int) -> int:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(
                f"index: must be one whole number, got {i!r}; "
                "for several networks: (path[i] for i in range(...))."
            )
        if not -len(self) <= i < len(self):
            raise IndexError(f"index: {i} is outside the path, which has {len(self)} networks.")
        return i % len(self)

    @property
    def metadata(self) -> tuple[PathPoint, ...]:
        """Step, drift and path length of every recorded network, in order."""
        return tuple(self._points)

    @property
    def steps(self) -> list[int]:
        """The step after which each network was recorded, starting with 0."""
        return [point.step for point in self._points]

    @property
    def drifts(self) -> list[float | None]:
        """The drift reported with each network; see ``PathPoint.drift``."""
        return [point.drift for point in self._points]

    def length(self) -> float:
        """Euclidean length of the polyline through the recorded networks, over the parameters.

        Buffers do not count. With ``every=1`` and steps of length ``eps`` it is ``eps`` times their number;
        with a larger ``every`` the polyline cuts corners and is shorter than the way the steps took.
        """
        return self._points[-1].length if self._points else 0.0

    def load_into(self, model: nn.Module, i: int) -> None:
        """Copy the i-th recorded network into ``model``, parameters and persistent buffers.

        Raises:
            IndexError: If there is no i-th network.
            ValueError: If the model's tensors are not the recorded ones by name and shape; the message
                names them, and the model is as it was.
        """
        state = self[i]
        own = _tensors(unwrap(model))
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
        each file is read once in all, and memory does not grow with the number of networks.

        Args:
            components: How many to return; those beyond the n networks' span are zero.

        Returns:
            Coordinates of the networks, (n, components) float64, in the units of the weights, each column
            signed so that its largest entry is positive; and the share of the variance that each component
            holds, (components,).

        Raises:
            ValueError: If nothing is recorded yet or ``components`` is not positive.
        """
        n = len(self)
        if n == 0:
            raise ValueError(
                "the path holds no network yet; record one with ``with opt.record(...) as path:``."
            )
        if components < 1:
            raise ValueError(f"components: must be 1 or more, got {components!r}.")
        gram = torch.zeros(n, n, dtype=torch.float64)
        for block in self._blocks(max(1, _PCA_BYTES // (8 * n))):
            block -= block.mean(0)
            gram.addmm_(block, block.T)
        values, vectors = torch.linalg.eigh(gram)
        kept = min(components, n)
        values = values.flip(0)[:kept].clamp(min=0)
        coordinates = vectors.flip(1)[:, :kept] * values.sqrt()
        largest = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True))
        coordinates = coordinates * torch.where(largest < 0, -1.0, 1.0)
        total = float(gram.trace())
        shares = values / total if total > 0 else torch.zeros_like(values)
        missing = components - kept
        return (
            nn.functional.pad(coordinates, (0, missing)),
            nn.functional.pad(shares, (0, missing)),
        )

    def _blocks(self, width: int) -> Iterator[Tensor]:
        """The parameters of all networks, (n, about ``width`` coordinates) float64 at a time."""
        shapes = self._shapes()
        pieces: list[tuple[str, slice]] = []
        size = 0
        for name in self._parameters:
            shape = shapes[name]
            rows = shape[0] if shape else 1
            row = max(1, _numel(shape) // max(1, rows))
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
            if self.folder is None:
                state = self._states[i]
                parts = [
                    state[name][part] if state[name].ndim else state[name] for name, part in pieces
                ]
            else:
                with _safe_open(self._file(i)) as file:
                    parts = [_read_slice(file, name, part) for name, part in pieces]
            row = torch.cat([part.reshape(-1).double() for part in parts])
            if block is None:
                block = row.new_empty(len(self), len(row))
            block[i] = row
        assert block is not None
        return block

    def _shapes(self) -> dict[str, list[int]]:
        if self.folder is None:
            return {name: list(self._states[0][name].shape) for name in self._parameters}
        with _safe_open(self._file(0)) as file:
            return {name: list(file.get_slice(name).get_shape()) for name in self._parameters}

    def plot(
        self,
        ax: Axes | None = None,
        *,
        color: Sequence[float] | None = None,
        label: str = "step",
        cmap: str = "viridis",
    ) -> Axes:
        """Draw the path in the plane of its first two principal components.

        Args:
            ax: Where to draw; a new figure if None.
            color: One number for each network, for instance accuracies along the path; their steps if None.
            label: What the numbers are, beside the colour bar.
            cmap: A matplotlib colour map.

        Returns:
            The axes, for titles and ``ax.figure.savefig(...)``.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If nothing is recorded, or ``color`` has not one number for each network.
        """
        shown = list(self.steps if color is None else color)
        if len(shown) != len(self):
            raise ValueError(
                f"color: must hold one number for each of the {len(self)} networks, got {len(shown)}."
            )
        points, shares = self.pca(2)
        if ax is None:
            ax = _import("matplotlib.pyplot", "draw a path").subplots()[1]
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
        ValueError: If ``indices`` is empty, or the recorded networks do not fit ``model``.
        IndexError: If an index is outside the path.
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
        chosen = range(len(path)) if indices is None else indices
        self.indices = tuple(path._position(i) for i in chosen)
        if not self.indices:
            raise ValueError("indices: is empty; an ensemble needs at least one recorded network.")
        self.dim = dim
        self._path = path
        self.model = copy.deepcopy(unwrap(model)).requires_grad_(False).eval()
        self.model.zero_grad()
        _check_fit(_tensors(self.model), path[self.indices[0]])

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
        own = _tensors(self.model)
        for i in self.indices:
            state = self._path._read(i)
            state = self._path._with_aliases({name: t.to(own[name]) for name, t in state.items()})
            logits = read_logits(functional_call(self.model, state, inputs, keywords))
            shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(self.dim)
            total = shares if total is None else total + shares
        assert total is not None
        return total


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers themselves, by every name they have."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """CPU copies of the model's tensors once each, the second names of tied ones, and the parameters' names."""
    state: dict[str, Tensor] = {}
    first_names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    parameters: list[str] = []
    for name, tensor in _tensors(model).items():
        if id(tensor) in first_names:
            aliases[name] = first_names[id(tensor)]
            continue
        first_names[id(tensor)] = name
        # Contiguous whatever the memory format, since that is how safetensors stores it.
        kept = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        state[name] = kept
        if isinstance(tensor, nn.Parameter):
            parameters.append(name)
    return state, aliases, parameters


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Sequence[str]) -> float:
    parts = [torch.linalg.vector_norm(a[name].double() - b[name].double()) for name in names]
    return float(torch.linalg.vector_norm(torch.stack(parts))) if parts else 0.0


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is not in the path" for name in own if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(own[name].shape)} in the model and {tuple(state[name].shape)} in the path"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
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


def _numel(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _import(module: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f'{package} is needed to {purpose} and is not installed: pip install "fipoptim[recipes]".'
        ) from error


def _safetensors() -> ModuleType:
    return _import("safetensors.torch", "keep a path in a folder")


def _safe_open(file: Path) -> Any:
    return _import("safetensors", "keep a path in a folder").safe_open(file, framework="pt")


def _read_slice(file: Any, name: str, part: slice) -> Tensor:
    whole = file.get_slice(name)
    tensor: Tensor = whole[part] if whole.get_shape() else file.get_tensor(name)
    return tensor


def _refuse_a_path_in(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"folder: {str(folder)!r} is a file; give a folder.")
    if (folder / _INDEX).exists() or any(folder.glob("network-*.safetensors")):
        raise FileExistsError(
            f"folder: {str(folder)!r} already holds a recorded path. Choose another folder, remove this one, "
            "or read it with FIPPath.open(folder)."
        )


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there, so that a reader never sees half of one."""
    partial = file.with_name(file.name + ".partial")
    try:
        write(partial)
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
