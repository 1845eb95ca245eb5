"""Anchors: the inputs on which a network's function must not change, and how far it has drifted there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Self, cast, overload

import torch
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fipoptim.embedding import PureLookups
from fipoptim.output_space import OutputMap, flatten_outputs, output_map, predictions

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


@contextlib.contextmanager
def evaluation(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no autocast, attention that forward-mode AD can take; everything is put back afterwards.

    The RNG state is forked as well: whatever the model draws, the training loop does not notice.
    """
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
        self._padding: dict[str, list[int]] | None = None
        self.inputs: Inputs = _checked_inputs(inputs)
        count = len(self)
        if batch_size is not None and batch_size > count:
            raise ValueError(f"batch_size: {batch_size} is more than the {count} anchors given.")
        self.reference: Tensor = self._finite(self._first_outputs())
        # With augment: the networks that give reference outputs, and which of them each anchor belongs to.
        self._references: list[Weights] = [self._frozen()] if augment else []
        self._segments = torch.zeros(count, dtype=torch.long)

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
        kept, weights = [], self.weights()
        references = iter(self.reference.split([count_inputs(x) for x in self.chunks(self.inputs)]))
        with evaluation(self.model, self.device), torch.no_grad():
            for chunk in self.progress(self.chunks(self.inputs)):
                z = self._mapped(chunk, weights)
                before = next(references).to(z.device).reshape(z.shape)
                kept.append((predictions(z) == predictions(before)).all(dim=1))
        return float(torch.cat(kept).double().mean())

    def refresh(self) -> None:
        """Make today's outputs the reference of all anchors."""
        self.reference = self._finite(self.outputs(self.inputs))
        if self.augment:
            self._references = [self._frozen()]
        self._segments.zero_()

    def extend(self, inputs: Tensor | Iterable[Tensor] | Mapping[str, Tensor]) -> None:
        """Add anchors, referenced to today's outputs; those already held keep their reference.

        With ``augment`` this keeps another frozen copy of the network.

        Raises:
            TypeError: If ``inputs`` is not of the form of the anchors already held.
            ValueError: As for the constructor.
        """
        new = _checked_inputs(inputs)
        if named_tensors(new).keys() != named_tensors(self.inputs).keys():
            raise TypeError(
                f"inputs: the anchors held are {sorted(named_tensors(self.inputs))}, got {sorted(named_tensors(new))}."
            )
        reference = self._finite(self.outputs(new))
        joined = concatenate([self.inputs, new])
        self.inputs, self.reference = joined, torch.cat([self.reference, reference])
        segment = len(self._references) if self.augment else 0
        if self.augment:
            self._references.append(self._frozen())
        self._segments = torch.cat([self._segments, torch.full((count_inputs(new),), segment)])

    # --- what a step sees -----------------------------------------------------------------------------

    def all(self) -> Sample:
        """All anchors, plain."""
        return Sample(self.inputs, self.reference)

    def sample(self, step: int) -> Sample:
        """The anchors of step number ``step``: drawn and augmented as asked for, the same at every call."""
        if self.batch_size is None and self.augment is None:
            return self.all()
        seed = seed_of_step(self._seed, step)
        index = torch.arange(len(self))
        if self.batch_size is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
            index = order[: self.batch_size]
        if self.augment is None:
            return Sample(self._select(index), self.reference[index.to(self.reference.device)])
        device = self.device
        parts: list[Inputs] = []
        references: list[Tensor] = []
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
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

        To be called inside :func:`evaluation`.
        """
        return flatten_outputs(self._mapped(inputs, weights), count_inputs(inputs))

    def padding_rows(self) -> dict[str, list[int]]:
        """The padding rows of tables of embeddings, by the parameter's name: no lookup has a derivative by them."""
        if self._padding is not None:
            return self._padding
        weights, lookups = self.weights(), PureLookups()
        few = map_inputs(lambda x: x[:2], self.inputs)  # any tell, as all are looked up alike
        with evaluation(self.model, self.device), torch.no_grad():
            self._mapped(few, weights, lookups)
        names = {id(p): name for name, p in weights.parameters.items()}
        rows: dict[str, set[int]] = {}
        for table, row in lookups.padding:
            if id(table) in names:
                rows.setdefault(names[id(table)], set()).add(row)
        self._padding = {name: sorted(found) for name, found in rows.items()}
        return self._padding

    def _mapped(self, inputs: Inputs, weights: Weights, lookups: PureLookups | None = None) -> Any:
        """What the output map makes of the model's outputs, before it is checked and flattened."""
        device = self.device
        inputs = map_inputs(lambda x: x.to(device, non_blocking=True), inputs)
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
        weights = weights or self.weights()
        with evaluation(self.model, self.device), torch.no_grad():
            chunks = self.progress(self.chunks(inputs))
            return torch.cat([self.call(chunk, weights) for chunk in chunks])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: inputs, reference outputs, reference networks and the seed of the draws.

        Loads with ``torch.load(weights_only=True)``.
        """
        return {
            "inputs": self.inputs,
            "reference": self.reference,
            "references": [tuple(weights) for weights in self._references],
            "segments": self._segments,
            "seed": self._seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, so that a resumed run goes on along the same path.

        Raises:
            ValueError: If ``state`` is not of the form that :meth:`state_dict` gives, or of other outputs.
        """
        missing = {"inputs", "reference", "references", "segments", "seed"} - state.keys()
        if missing:
            raise ValueError(
                f"state: lacks {sorted(missing)}; give what AnchorBatch.state_dict() returned."
            )
        if state["reference"].shape[1] != self.reference.shape[1]:
            raise ValueError(
                f"state: holds {state['reference'].shape[1]} outputs an anchor, the model gives "
                f"{self.reference.shape[1]}; it belongs to another model or output space."
            )
        if bool(state["references"]) != bool(self.augment):
            raise ValueError(
                "state: augment was given for one of the two runs but not for the other."
            )
        self.inputs = map_inputs(torch.clone, state["inputs"])
        self.reference = state["reference"].to(self.reference)
        self._references = [
            Weights(*({name: t.to(self.device) for name, t in part.items()} for part in weights))
            for weights in state["references"]
        ]
        self._segments = state["segments"].clone()
        self._seed = state["seed"]

    def _first_outputs(self) -> Tensor:
        try:
            return self.outputs(self.inputs)
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


def squared_distance(z: Tensor, reference: Tensor) -> Tensor:
    """:math:`‖z_i - z_{ref,i}‖²` for each anchor, shape ``(N,)``."""
    return (z - reference.to(z.device)).square().sum(dim=1)
