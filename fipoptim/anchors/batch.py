"""Anchors: the inputs on which a network's function must not change, and how far it has drifted there."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Self, cast, overload

import torch
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from fipoptim.anchors.embedding import PureLookups
from fipoptim.anchors.fingerprint import Fingerprint, fingerprint_of
from fipoptim.anchors.output_space import OutputMap, flatten_outputs, output_map, predictions
from fipoptim.anchors.route import Route

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


class Sample(NamedTuple):
    """The anchors of one step: their inputs and the outputs ``(N, m)`` they had at the reference."""

    inputs: Inputs
    reference: Tensor


class Weights(NamedTuple):
    """A network as values: its parameters and buffers by name."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


# --- inputs: a tensor, a tuple of tensors (positional) or a dict of tensors (keywords) ---------------


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply ``function`` to every tensor of ``inputs``."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return {name: function(x) for name, x in inputs.items()}
    return tuple(function(x) for x in inputs)


def named_tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of ``inputs`` under a name to use in messages."""
    if isinstance(inputs, Tensor):
        return {"inputs": inputs}
    if isinstance(inputs, dict):
        return {f"inputs[{name!r}]": x for name, x in inputs.items()}
    return {f"inputs[{i}]": x for i, x in enumerate(inputs)}


def count_inputs(inputs: Inputs) -> int:
    """The number of anchors in ``inputs``."""
    return next(iter(named_tensors(inputs).values())).shape[0]


def split_inputs(inputs: Inputs, size: int) -> list[Inputs]:
    """``inputs`` in parts of at most ``size`` anchors, which are views."""
    count = count_inputs(inputs)
    if size >= count:
        return [inputs]
    return [
        map_inputs(lambda x, i=i: x[i : i + size], inputs)  # type: ignore[misc]
        for i in range(0, count, size)
    ]


def concatenate(parts: list[Inputs]) -> Inputs:
    """Inputs of the same form, joined along dimension 0."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(cast(list[Tensor], parts))
    if isinstance(first, dict):
        dicts = cast(list[dict[str, Tensor]], parts)
        return {name: torch.cat([part[name] for part in dicts]) for name in first}
    return tuple(torch.cat(xs) for xs in zip(*cast(list[tuple[Tensor, ...]], parts), strict=True))


def _checked_inputs(inputs: Any) -> Inputs:
    """``inputs`` in its canonical form, detached and owned by us.

    Raises:
        TypeError: If it is not a tensor or a tuple, list or mapping of tensors.
        ValueError: If it is empty, if the tensors disagree on dimension 0, or if a float is not finite.
    """
    form: Inputs
    if isinstance(inputs, Tensor):
        form = inputs
    elif isinstance(inputs, Mapping):
        form = dict(inputs)
    elif isinstance(inputs, (tuple, list)):
        form = tuple(inputs)
    else:
        raise TypeError(
            "inputs: must be a tensor, a tuple of tensors or a dict of tensors with the anchors along "
            f"dimension 0; got {type(inputs).__name__}."
        )
    tensors = named_tensors(form)
    if not tensors:
        raise ValueError(f"inputs: got an empty {type(inputs).__name__}; give at least one tensor.")
    sizes: dict[str, int] = {}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: must be a tensor, got {type(x).__name__}.")
        if x.dim() == 0 or x.shape[0] == 0:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, which holds no anchor; "
                "give at least one, along dimension 0."
            )
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: holds NaN or infinite values; clean the anchors first.")
        sizes[name] = x.shape[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"inputs: all tensors need the same number of anchors along dimension 0, got {sizes}."
        )
    return map_inputs(lambda x: x.detach().clone(), form)


def _copied(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device`` in memory of its own, in its own layout."""
    moved = x.to(device, non_blocking=True)
    return moved.clone() if moved is x else moved


def _segments(count: int, number: int = 0) -> Tensor:
    """The number of the reference network of each of ``count`` anchors."""
    return torch.full((count,), number, dtype=torch.long, device="cpu")


# --- random draws: functions of a seed and the step's number, so that a resumed run repeats them ------


def draw_seed(generator: Generator | None) -> int:
    """A seed from ``generator``, which moves on; or torch's own, which does not."""
    if generator is None:
        return torch.initial_seed() % 2**63
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def seed_of_step(seed: int, step: int) -> int:
    """The seed of what is drawn for step number ``step``."""
    return (seed * 1_000_003 + step) % 2**63


# --- evaluation: the function is what the model computes in eval mode, in full precision --------------


def unwrap(model: nn.Module) -> nn.Module:
    """The module that owns the parameters behind DistributedDataParallel, DataParallel or torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU if it has none."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


# Forward-mode AD, the attention fast path, the random state and the caches of parametrizations are the process's, and
# not a thread's: one thread evaluates at a time.
_ONE_THREAD = threading.RLock()


@contextlib.contextmanager
def evaluation(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no autocast, attention that forward-mode AD can take; everything is put back afterwards.

    The RNG state is forked as well: whatever the model draws, the training loop does not notice. Inference mode is
    left, as its tensors have no derivative, and so is ``parametrize.cached()``, which would hand out the weights of
    before a step. Threads take turns.
    """
    with (
        _ONE_THREAD,
        torch.inference_mode(False),
        _without_cached_weights(),
        _evaluated(model, device),
    ):
        yield


@contextlib.contextmanager
def _without_cached_weights() -> Iterator[None]:
    """Parametrized weights are computed from the parameters at each access, as outside of ``parametrize.cached()``."""
    enabled, cache = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = enabled, cache


@contextlib.contextmanager
def _evaluated(model: nn.Module, device: torch.device) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    # The fused encoder layer and the fused attention kernels have no forward-mode derivative.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    devices = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        try:
            # Set the flag rather than call eval(), which models override with side effects.
            for module in training:
                module.training = False
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for module in training:
                module.training = True


class AnchorBatch:
    r"""The inputs whose outputs a network is to keep, and the outputs they had at the reference.

    On construction the model's outputs of now become the reference. The model is always evaluated in eval
    mode, without autocast; its mode, its buffers and the RNG state are left as they were.

    Args:
        model: The network. Behind DistributedDataParallel or ``torch.compile`` the inner module is used.
        inputs: The anchors along dimension 0: a tensor, a tuple of tensors (positional inputs) or a dict of
            tensors (keyword inputs). They may live on another device than the model.
        output: The space in which outputs are compared: ``"logits"`` (Euclidean), ``"probabilities"``
            (:math:`2\sqrt{\text{softmax}}`, the Fisher metric; classes in the last dimension), or a callable
            that gets what the model returns and gives a float tensor with one row per anchor.
        batch_size: Anchors drawn for each step, without replacement; None takes all of them at every step.
        chunk_size: Anchors evaluated at a time: bounds memory. None evaluates the step's anchors at once. Where the
            outputs of an anchor depend on the others (batch norm without running statistics), a chunk is a batch, and
            so is each block of at most 128 images that the metric takes on a CPU.
        compile: Compile the derivative with ``torch.compile``: tens of seconds for each shape of a step's anchors,
            and faster products after that. On a CPU it needs a C++ compiler.
        progress: Wraps the chunks of every pass over the anchors, as ``tqdm`` does; for passes that take minutes.
        generator: Where the seed of the draws comes from. None takes ``torch.initial_seed()``. The draws of a
            step are a function of this seed and the step's number, so a resumed run sees the same anchors.
        augment: Makes few anchors many: each step sees ``augment(inputs)``, and a frozen copy of the
            reference network gives their outputs. It is called under a seed of its own for each step.
            :meth:`drift` stays on the plain anchors.

    Raises:
        TypeError: If an argument has the wrong type or the model's output is not a float tensor.
        ValueError: If there are no anchors, if tensors disagree on dimension 0, if a size is out of range, or
            if the model's outputs are not finite.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor | Iterable[Tensor] | Mapping[str, Tensor],
        *,
        output: str | OutputMap = "logits",
        batch_size: int | None = None,
        chunk_size: int | None = None,
        generator: Generator | None = None,
        augment: Callable[[Any], Any] | None = None,
        compile: bool = False,
        progress: Callable[[list[Inputs]], Iterable[Inputs]] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: must be a torch.nn.Module, got {type(model).__name__}.")
        for name, size in (("batch_size", batch_size), ("chunk_size", chunk_size)):
            if size is not None and (
                not isinstance(size, int) or isinstance(size, bool) or size < 1
            ):
                raise ValueError(f"{name}: must be a positive integer or None, got {size!r}.")
        for name, function in (("augment", augment), ("progress", progress)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}: must be callable or None, got {type(function).__name__}.")
        self.model = unwrap(model)
        self.output = output
        self.batch_size = batch_size
        self.chunk_size = chunk_size
        self.augment = augment
        self.compile = compile
        self.progress = progress or iter
        self._map = output_map(output)
        self._seed = draw_seed(generator)
        self.inputs: Inputs = _checked_inputs(inputs)
        count = len(self)
        if batch_size is not None and batch_size > count:
            raise ValueError(f"batch_size: {batch_size} is more than the {count} anchors given.")
        self.route = Route()
        self._padding_rows: dict[str, list[int]] | None = None  # not looked for yet
        self.reference: Tensor = self._finite(self._first_outputs())
        # With augment: the networks that give reference outputs, and which of them each anchor belongs to.
        self._references: list[Weights] = [self._frozen()] if augment else []
        self._segments = _segments(count)

    @classmethod
    def from_loader(cls, model: nn.Module, loader: Iterable[Any], n: int, **options: Any) -> Self:
        """Anchors from the first ``n`` inputs of a DataLoader (or any iterable of batches).

        A batch that is a tuple or list is read at position 0; a dict is taken whole, without ``labels`` and
        ``label``. ``options`` are those of :class:`AnchorBatch`.

        Raises:
            ValueError: If ``n`` is not positive or the loader yields fewer than ``n`` inputs.
        """
        if n < 1:
            raise ValueError(f"n: must be a positive number of anchors, got {n!r}.")
        parts: list[Inputs] = []
        found = 0
        for batch in loader:
            x = batch
            if isinstance(batch, (tuple, list)):
                x = batch[0]
            elif isinstance(batch, Mapping):
                x = {name: t for name, t in batch.items() if name not in ("labels", "label")}
            part = _checked_inputs(x)
            size = count_inputs(part)
            if found + size > n:
                keep = n - found
                part = map_inputs(lambda t, keep=keep: t[:keep], part)  # type: ignore[misc]
            parts.append(part)
            found += count_inputs(part)
            if found == n:
                return cls(model, concatenate(parts), **options)
        raise ValueError(f"n: {n} anchors wanted, but the loader yields only {found} inputs.")

    def __len__(self) -> int:
        """The number of anchors."""
        return count_inputs(self.inputs)

    def __repr__(self) -> str:
        """One line: how many anchors, in which output space, and how they are evaluated."""
        return (
            f"AnchorBatch({len(self)} anchors, {self.reference.shape[1]} outputs each, output={self.output!r}, "
            f"batch_size={self.batch_size}, chunk_size={self.chunk_size}, augment={self.augment!r})"
        )

    # --- how far the function has moved -------------------------------------------------------------

    @overload
    def drift(self, reduction: Literal["mean", "sum"] = "mean") -> float: ...
    @overload
    def drift(self, reduction: Literal["none"]) -> Tensor: ...
    def drift(self, reduction: str = "mean") -> float | Tensor:
        """Squared distance of today's outputs from the reference, :math:`‖z - z_{ref}‖²`, over all anchors.

        Args:
            reduction: ``"mean"`` or ``"sum"`` over the anchors (a float), or ``"none"`` (a tensor ``(N,)``).

        Raises:
            ValueError: If ``reduction`` is none of these.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: choose 'mean', 'sum' or 'none', got {reduction!r}.")
        squared = squared_distance(self.outputs(self.inputs), self.reference)
        if reduction == "none":
            return squared
        return float(squared.mean() if reduction == "mean" else squared.sum())

    def predictions_kept(self) -> float:
        """Fraction of anchors whose prediction is that of the reference.

        An anchor with outputs ``(C,)`` predicts the class of the largest. With ``(T, C)``, as of a token classifier, it
        predicts one class at each of the T positions, and with feature maps ``(C, H, W)`` one at each pixel: all of
        them have to be the same. A single output predicts by its sign; with ``output="probabilities"``, the likelier
        of the two classes. With a callable ``output`` the same is said of what it returns.
        """
        kept: list[Tensor] = []
        weights, chunks = self.weights(), self.chunks(self.inputs)
        references = iter(self.reference.split([count_inputs(x) for x in chunks]))
        with evaluation(self.model, self.device), torch.enable_grad():
            for chunk in self.progress(chunks):
                z = self._mapped(chunk, weights).detach()
                before = next(references)
                check_width(flatten_outputs(z, len(before)), before)
                then = predictions(before.to(z.device).reshape(z.shape))
                kept.append((predictions(z) == then).all(dim=1))
        return float(torch.cat(kept).double().mean())

    @torch.inference_mode(False)
    def refresh(self) -> None:
        """Make today's outputs the reference of all anchors.

        Raises:
            ValueError: If the model's outputs are not finite; the reference is then as it was.
        """
        reference = self._finite(self.outputs(self.inputs))
        references = [self._frozen()] if self.augment else []
        self.reference, self._references = reference, references
        self._segments = _segments(len(self))
        self.route.mixing = None  # the model may be another

    @torch.inference_mode(False)
    def extend(self, inputs: Tensor | Iterable[Tensor] | Mapping[str, Tensor]) -> None:
        """Add anchors, referenced to today's outputs; those already held keep their reference.

        With ``augment`` this keeps another frozen copy of the network.

        Raises:
            TypeError: If ``inputs`` is not of the form of the anchors already held.
            ValueError: As for the constructor, or if the model now gives another number of outputs.
        """
        new = _checked_inputs(inputs)
        if named_tensors(new).keys() != named_tensors(self.inputs).keys():
            raise TypeError(
                f"inputs: the anchors held are {sorted(named_tensors(self.inputs))}, got {sorted(named_tensors(new))}."
            )
        reference = self._finite(self.outputs(new))
        check_width(reference, self.reference)
        joined = concatenate([self.inputs, new])
        references = [*self._references, self._frozen()] if self.augment else []
        segments = _segments(count_inputs(new), len(self._references) if self.augment else 0)
        # Nothing is taken over before everything is known.
        self._segments = torch.cat([self._segments, segments])
        self.reference = torch.cat([self.reference, reference.to(self.reference)])
        self.inputs, self._references = joined, references
        self.route.mixing = None

    # --- what a step sees -----------------------------------------------------------------------------

    def all(self) -> Sample:
        """All anchors, plain."""
        return Sample(self.inputs, self.reference)

    @torch.inference_mode(False)
    def sample(self, step: int) -> Sample:
        """The anchors of step number ``step``: drawn and augmented as asked for, the same at every call."""
        if self.batch_size is None and self.augment is None:
            return self.all()
        seed = seed_of_step(self._seed, step)
        index = torch.arange(len(self), device="cpu")
        if self.batch_size is not None:
            order = torch.randperm(
                len(self), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
            )
            index = order[: self.batch_size]
        if self.augment is None:
            return Sample(self._select(index), self.reference[index.to(self.reference.device)])
        device = self.device
        parts: list[Inputs] = []
        references: list[Tensor] = []
        devices = [device] if device.type == "cuda" else []
        with _ONE_THREAD, torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            # Anchors of different references are not mixed with each other.
            for segment in self._segments[index].unique().tolist():
                chosen = self._select(index[self._segments[index] == segment])
                new = _checked_inputs(self.augment(chosen))
                parts.append(new)
                references.append(self._finite(self.outputs(new, self._references[segment])))
        return Sample(concatenate(parts), torch.cat(references))

    # --- the function ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    @torch.inference_mode(False)
    def weights(self) -> Weights:
        """Today's network: detached parameters (aliases) and copies of the buffers.

        The copies keep a model that writes to its buffers from changing them here.
        """
        return Weights(
            {name: p.detach() for name, p in self.model.named_parameters()},
            {name: b.detach().clone() for name, b in self.model.named_buffers()},
        )

    def call(self, inputs: Inputs, weights: Weights) -> Tensor:
        """The outputs ``z`` ``(N, m)`` of ``inputs``, differentiable in ``weights``.

        To be called inside :func:`evaluation`. The model gets a copy of the inputs, which it may write to.
        """
        return flatten_outputs(self._mapped(inputs, weights), count_inputs(inputs))

    def padding_rows(self) -> dict[str, list[int]]:
        """The padding rows of tables of embeddings, by the parameter's name: no lookup has a derivative by them."""
        if self._padding_rows is None:
            weights, lookups = self.weights(), PureLookups()
            few = map_inputs(lambda x: x[:2], self.inputs)  # any tell, as all are looked up alike
            with evaluation(self.model, self.device), torch.enable_grad():
                self._mapped(few, weights, lookups)
            names = {id(p): name for name, p in weights.parameters.items()}
            rows: dict[str, set[int]] = {}
            for table, row in lookups.padding:
                if id(table) in names:
                    rows.setdefault(names[id(table)], set()).add(row)
            self._padding_rows = {name: sorted(found) for name, found in rows.items()}
        return self._padding_rows

    def _mapped(self, inputs: Inputs, weights: Weights, lookups: PureLookups | None = None) -> Any:
        """What the output map makes of the model's outputs, before it is checked and flattened."""
        device = self.device
        inputs = map_inputs(lambda x: _copied(x, device), inputs)
        if self._writes_buffers:
            weights = weights._replace(buffers={k: b.clone() for k, b in weights.buffers.items()})
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        args = (args,) if isinstance(args, Tensor) else args
        with lookups or PureLookups():
            result = torch.func.functional_call(self.model, tuple(weights), args, kwargs)
        return self._map(result)

    def chunks(self, inputs: Inputs) -> list[Inputs]:
        """``inputs`` in parts of at most ``chunk_size``."""
        return split_inputs(inputs, self.chunk_size or count_inputs(inputs))

    def outputs(self, inputs: Inputs, weights: Weights | None = None) -> Tensor:
        """The outputs ``z`` ``(N, m)`` of ``inputs``, without a graph; today's weights unless given."""
        # Weights without a gradient leave no graph; a model that differentiates in its forward pass needs one.
        with evaluation(self.model, self.device), torch.enable_grad():
            weights = weights or self.weights()
            chunks = self.progress(self.chunks(inputs))
            return torch.cat([self.call(chunk, weights).detach() for chunk in chunks])

    def fingerprint(self) -> Fingerprint:
        """Numbers by which the reference outputs are known again: equal up to rounding if, and only if, these are.

        An optimizer's state carries them, so that a resumed run cannot take another reference for its own.
        """
        return fingerprint_of(self.reference)

    @torch.inference_mode(False)
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: a copy of inputs, reference outputs, reference networks and the draws' seed.

        Loads with ``torch.load(weights_only=True)``.
        """
        return {
            "inputs": map_inputs(torch.clone, self.inputs),
            "reference": self.reference.clone(),
            "references": [
                tuple({name: t.clone() for name, t in part.items()} for part in weights)
                for weights in self._references
            ],
            "segments": self._segments.clone(),
            "seed": self._seed,
            "route": self.route.state_dict(),
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, so that a resumed run goes on along the same path.

        Raises:
            ValueError: If ``state`` is not of the form that :meth:`state_dict` gives, belongs to another model or
                output space, or holds NaN or infinite values. The anchors are then as they were.
        """
        self._check_keys(state)
        try:
            inputs = _checked_inputs(state["inputs"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"state: 'inputs' is not what AnchorBatch.state_dict() gives: {error}"
            ) from error
        count = count_inputs(inputs)
        if self.batch_size is not None and self.batch_size > count:
            raise ValueError(
                f"state: holds {count} anchors, fewer than batch_size={self.batch_size}."
            )
        reference = self._checked_reference(state["reference"], inputs)
        references = self._checked_networks(state["references"])
        segments, seed = state["segments"], state["seed"]
        if not (
            isinstance(segments, Tensor)
            and segments.dtype == torch.long
            and segments.shape == (count,)
            and bool(((segments >= 0) & (segments < max(1, len(references)))).all())
        ):
            raise ValueError(
                f"state: 'segments' must number one of {max(1, len(references))} reference networks for each of "
                f"the {count} anchors, got {segments!r}."
            )
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(
                f"state: 'seed' must be a whole number from 0 to 2^63 - 1, got {seed!r}."
            )
        route = Route.of_state(state["route"])
        self.inputs, self.reference, self._references = inputs, reference, references
        self._segments, self._seed, self.route = segments.cpu().clone(), seed, route

    def _check_keys(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise ValueError(
                f"state: must be what AnchorBatch.state_dict() returned, got {type(state).__name__}."
            )
        wanted = {"inputs", "reference", "references", "segments", "seed", "route"}
        if missing := wanted - state.keys():
            raise ValueError(
                f"state: lacks {sorted(missing)}; give what AnchorBatch.state_dict() returned."
            )
        if unknown := state.keys() - wanted:
            raise ValueError(
                f"state: has unknown entries {sorted(map(str, unknown))}; give what "
                "AnchorBatch.state_dict() returned."
            )

    def _checked_reference(self, reference: Any, inputs: Inputs) -> Tensor:
        """The reference outputs of a state, if the model gives outputs like them on ``inputs``."""
        if not (
            isinstance(reference, Tensor)
            and reference.is_floating_point()
            and reference.dim() == 2
            and len(reference) == count_inputs(inputs)
        ):
            got = (
                f"{tuple(reference.shape)} of {reference.dtype}"
                if isinstance(reference, Tensor)
                else reference
            )
            raise ValueError(
                f"state: 'reference' must be a float tensor with a row for each of the {count_inputs(inputs)} anchors, "
                f"got {got}."
            )
        if not bool(torch.isfinite(reference).all()):
            raise ValueError("state: 'reference' holds NaN or infinite values.")
        try:
            width = self.outputs(map_inputs(lambda x: x[:2], inputs)).shape[1]
        except Exception as error:
            raise ValueError(
                f"state: its inputs do not fit the model, {type(self.model).__name__} ({error}); it belongs to "
                "another model."
            ) from error
        if reference.shape[1] != width:
            raise ValueError(
                f"state: holds {reference.shape[1]} outputs an anchor, the model gives {width}; it belongs to another "
                "model or output space."
            )
        return reference.to(self.reference, copy=True)

    def _checked_networks(self, networks: Any) -> list[Weights]:
        """The reference networks of a state, if they are networks like the model."""
        if not isinstance(networks, list) or bool(networks) != bool(self.augment):
            raise ValueError(
                "state: augment was given for one of the two runs but not for the other."
                if isinstance(networks, list)
                else f"state: 'references' must be a list, got {type(networks).__name__}."
            )
        checked = []
        for i, network in enumerate(networks):
            if not isinstance(network, (tuple, list)) or len(network) != 2:
                raise ValueError(
                    f"state: reference network {i} is not a pair of parameters and buffers."
                )
            parts = []
            for kind, part, own in zip(
                ("parameters", "buffers"), network, self.weights(), strict=True
            ):
                shapes = {k: getattr(t, "shape", None) for k, t in part.items()}
                if shapes != {k: t.shape for k, t in own.items()}:
                    raise ValueError(
                        f"state: the {kind} of reference network {i} are not those of the model, "
                        f"{type(self.model).__name__}; it belongs to another model."
                    )
                if not all(bool(torch.isfinite(t).all()) for t in part.values()):
                    raise ValueError(
                        f"state: the {kind} of reference network {i} hold NaN or infinite values."
                    )
                parts.append({k: t.to(own[k], copy=True) for k, t in part.items()})
            checked.append(Weights(*parts))
        return checked

    def _first_outputs(self) -> Tensor:
        self._writes_buffers = False
        weights = self.weights()
        versions = [b._version for b in weights.buffers.values()]
        try:
            outputs = self.outputs(self.inputs, weights)
            # A model that keeps notes in eval mode starts every evaluation from those that it has now.
            self._writes_buffers = versions != [b._version for b in weights.buffers.values()]
            return self.outputs(self.inputs) if self._writes_buffers else outputs
        except TypeError as error:
            if isinstance(self.inputs, Tensor) or str(error).startswith("model:"):
                raise
            given = f"{len(self.inputs)} positional inputs"
            if isinstance(self.inputs, dict):
                given = f"the keywords {sorted(self.inputs)}"
            raise TypeError(
                f"inputs: {type(self.model).__name__} cannot be called with {given} ({error}). "
                "Give what the model takes, and no labels."
            ) from error

    def _select(self, index: Tensor) -> Inputs:
        return map_inputs(lambda x: x[index.to(x.device)], self.inputs)

    def _frozen(self) -> Weights:
        parameters, buffers = self.weights()
        return Weights({name: p.clone() for name, p in parameters.items()}, buffers)

    @staticmethod
    def _finite(z: Tensor) -> Tensor:
        if not bool(torch.isfinite(z).all()):
            raise ValueError(
                "model: its outputs on the anchors are not finite; nothing can be preserved. "
                "Check the weights and the inputs."
            )
        return z


def check_width(z: Tensor, reference: Tensor) -> None:
    """Refuse outputs ``(N, m)`` that are not as many for each anchor as the reference.

    Raises:
        ValueError: With what may have happened, and what to do.
    """
    if z.shape[1] != reference.shape[1]:
        raise ValueError(
            f"model: gives {z.shape[1]} outputs an anchor now, the reference has {reference.shape[1]}. Did its head "
            "grow since the anchors were made? Build the AnchorBatch with output= a function that picks the old "
            "outputs, for instance output=lambda z: z[:, :10], or refresh() the anchors to hold all that it gives now."
        )


def squared_distance(z: Tensor, reference: Tensor) -> Tensor:
    """:math:`‖z_i - z_{ref,i}‖²` for each anchor, shape ``(N,)``.

    Raises:
        ValueError: If the outputs are of another width than the reference.
    """
    check_width(z, reference)
    return (z - reference.to(z.device)).square().sum(dim=1)
