"""Anchors: the inputs on which a network's function must not change, and how far it has drifted there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Self, overload
from weakref import WeakSet

import torch
from torch import Generator, Tensor, nn

from fipoptim.anchors.draws import draw_seed, seed_of_step
from fipoptim.anchors.evaluation import seeded, unwrap
from fipoptim.anchors.fingerprint import Fingerprint, fingerprint_of
from fipoptim.anchors.inputs import (
    Inputs,
    check_forms,
    checked_inputs,
    concatenate,
    count_inputs,
    inputs_from_loader,
    refuse_call,
    select_inputs,
    split_inputs,
)
from fipoptim.anchors.measured import Measured, measured, predictions_kept
from fipoptim.anchors.network_function import NetworkFunction, Weights
from fipoptim.anchors.output_space import OutputMap, squared_distance
from fipoptim.anchors.reference import (
    reference_network,
    reference_outputs,
    references_of,
)
from fipoptim.anchors.refusals import check_callable, check_outputs, check_positive, check_width
from fipoptim.anchors.route import Route
from fipoptim.anchors.sample import Sample, drawn, set_aside
from fipoptim.anchors.state import AnchorState
from fipoptim.mean import AnchorMean

# By this a certificate finds out that it was asked for on anchors.
_IN_MEMORY: WeakSet[AnchorBatch] = WeakSet()


class AnchorBatch:
    r"""The inputs whose outputs a network is to keep, and the outputs they had at the reference.

    The outputs that the model has on construction become the reference, unless another one is given. The model is
    always evaluated in eval mode, without autocast; its mode, its buffers and the random state are left as they were.

    Args:
        model: The network. The inner module is used behind DistributedDataParallel or ``torch.compile``.
        inputs: The anchors along dimension 0: a tensor, a tuple of tensors (positional inputs) or a dict of
            tensors (keyword inputs). They may live on another device than the model.
        check: Inputs on which budgets count and which no step sees, in the form of ``inputs``; or the share of
            ``inputs`` that is set aside for this. How far the function moves on inputs that steps hold says little
            about others. With None budgets count on the anchors themselves.
        output: The space in which outputs are compared: ``"logits"`` (Euclidean), ``"probabilities"``
            (:math:`2\sqrt{\text{softmax}}`, the Fisher metric; classes in the last dimension), or a callable
            that gets what the model returns and gives a float tensor with one row per anchor.
        reference: Another network whose outputs are the reference, such as the one before a training that has already
            taken place; or the outputs themselves, ``(N, m)`` in the output space. With ``augment`` it must be a
            network of the model's architecture. None takes the model as it is now.
        batch_size: Anchors drawn for each step, without replacement; None takes all of them at every step.
        chunk_size: Anchors evaluated at a time, which bounds memory; None evaluates all anchors of a step at once. If
            the outputs of an anchor depend on the others (batch norm without running statistics), each chunk is a batch
            of its own.
        progress: Wraps the list of chunks of every pass over the anchors and yields them, as ``tqdm`` does; for passes
            that take minutes.
        generator: Gives the seed of the draws; None takes ``torch.initial_seed()``. The draws of a
            step are a function of this seed and the step's number, so a resumed run sees the same anchors.
        augment: Turns few anchors into many: each step sees ``augment(inputs)``, and a copy of the reference network
            gives the reference outputs of these. Before each call torch's random state is set to the seed of the
            step. :meth:`drift` is measured on the plain anchors.

    Attributes:
        inputs: The anchors, copied, in one of the three forms.
        reference: Their reference outputs, shape ``(N, m)``.
        check: The check inputs as anchors of their own, or None: ``anchors.check.drift()`` is the drift there.
        route: The record of which derivatives are traced on these anchors.

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
        check: Tensor | Iterable[Tensor] | Mapping[str, Tensor] | float | None = None,
        output: str | OutputMap = "logits",
        reference: nn.Module | Tensor | None = None,
        batch_size: int | None = None,
        chunk_size: int | None = None,
        generator: Generator | None = None,
        augment: Callable[[Any], Any] | None = None,
        progress: Callable[[list[Inputs]], Iterable[Inputs]] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: must be a torch.nn.Module, got {type(model).__name__}.")
        for name, size in (("batch_size", batch_size), ("chunk_size", chunk_size)):
            check_positive(name, size, or_none=True)
        for name, function in (("augment", augment), ("progress", progress)):
            check_callable(name, function)
        self.output = output
        self.batch_size = batch_size
        self.chunk_size = chunk_size
        self.augment = augment
        self.progress = progress or iter
        self.function = NetworkFunction(model, output)
        self._seed = draw_seed(generator)
        parts = set_aside(checked_inputs(inputs), check, self._seed)
        self.inputs: Inputs = parts.inputs
        count = len(self)
        if batch_size is not None and batch_size > count:
            raise ValueError(f"batch_size: {batch_size} is more than the {count} anchors given.")
        self.route = Route()
        self.reference: Tensor = check_outputs(self._first_outputs())
        # With augment: the networks that give reference outputs, and the number of each anchor's network among them.
        self._networks: list[Weights] = [] if augment is None else [self.function.snapshot()]
        reference, of_check = references_of(reference, parts)
        if reference is not None:
            self.reference = reference_outputs(
                reference, output, lambda: self.progress(self.chunks(self.inputs)), self.reference
            )
            if augment is not None:
                self._networks = [reference_network(reference, self.function)]
        self._segments = _segments(count)
        self.check: AnchorBatch | None = None
        if parts.check is not None:
            check_forms("check", parts.check, self.inputs)
            how: dict[str, Any] = {"output": output, "chunk_size": chunk_size, "progress": progress}
            self.check = AnchorBatch(model, parts.check, reference=of_check, **how)
            check_width(self.check.reference, self.reference)
        _IN_MEMORY.add(self)

    @classmethod
    def of_model(cls, model: nn.Module) -> list[AnchorBatch]:
        """The anchors of this model that are in memory; copies and unpickled ones are not among them."""
        model = unwrap(model)
        return [anchors for anchors in _IN_MEMORY if anchors.model is model]

    @classmethod
    def from_loader(cls, model: nn.Module, loader: Iterable[Any], n: int, **options: Any) -> Self:
        """Anchors from the first ``n`` inputs of a DataLoader (or any iterable of batches).

        A batch that is a tuple or list is read at position 0; a dict is taken whole, without ``labels`` and
        ``label``. ``options`` are those of :class:`AnchorBatch`.

        Raises:
            ValueError: If ``n`` is not positive or the loader yields fewer than ``n`` inputs.
        """
        return cls(model, inputs_from_loader(loader, n), **options)

    def __len__(self) -> int:
        """The number of anchors."""
        return count_inputs(self.inputs)

    def __repr__(self) -> str:
        """One line: how many anchors, in which output space, and how they are evaluated."""
        return (
            f"AnchorBatch({len(self)} anchors, {self.reference.shape[1]} outputs each, "
            f"{'no' if self.check is None else len(self.check)} check inputs, output={self.output!r}, "
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
        if reduction == "sum":
            return float(squared.sum())
        return float(AnchorMean(len(self)).of(squared))

    def predictions_kept(self) -> float:
        """Fraction of anchors whose prediction is that of the reference.

        An anchor with outputs ``(C,)`` predicts the class of the largest output. With outputs ``(T, C)``, as those of a
        token classifier, it predicts one class at each of the T positions, and with feature maps ``(C, H, W)`` one
        class at each pixel: all of them have to be the same. A single output predicts by its sign; with
        ``output="probabilities"`` it predicts the likelier of the two classes. With a callable ``output`` the same
        holds for what the callable returns.
        """
        kept = predictions_kept(self.outputs(self.inputs), self.reference, self.function.row_shape)
        return float(AnchorMean(len(self)).of(kept.double()))

    def measure(self, outputs: Tensor | None = None) -> Measured:
        """Drift and changed predictions over all anchors, in one evaluation.

        Args:
            outputs: The outputs of all anchors, ``(N, m)``; None evaluates the model of now.
        """
        now = self.outputs(self.inputs) if outputs is None else outputs
        return measured(now, self.reference, self.function.row_shape)

    @property
    def counted(self) -> AnchorBatch:
        """The inputs on which budgets count: the check inputs, or the anchors themselves without any."""
        return self if self.check is None else self.check

    # --- the reference --------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def refresh(self) -> None:
        """Make today's outputs the reference of all anchors, and of the check inputs.

        Raises:
            ValueError: If the model's outputs are not finite; the reference is then as it was.
        """
        reference = check_outputs(self.outputs(self.inputs))
        if self.check is not None:
            self.check.refresh()
        networks = [] if self.augment is None else [self.function.snapshot()]
        self.reference, self._networks = reference, networks
        self._segments = _segments(len(self))
        self.route.mixing = None  # the model may be another

    @torch.inference_mode(False)
    def extend(
        self,
        inputs: Tensor | Iterable[Tensor] | Mapping[str, Tensor],
        *,
        check: Tensor | Iterable[Tensor] | Mapping[str, Tensor] | float | None = None,
    ) -> None:
        """Add anchors with today's outputs as their reference; the anchors already here keep theirs.

        With ``augment`` a further copy of the network is kept.

        Args:
            inputs: The new anchors.
            check: Further check inputs, or the share of ``inputs`` that is set aside, as on construction. Anchors with
                check inputs ask for it: a budget that does not count on the new inputs would promise nothing of them.

        Raises:
            TypeError: If ``inputs`` is not of the form of the anchors already here.
            ValueError: As for the constructor, if the model now gives another number of outputs, or if ``check`` is
                given for anchors without check inputs, or the other way round.
        """
        if (check is None) != (self.check is None):
            have = (
                "no check inputs; build them with" if self.check is None else "check inputs; give"
            )
            raise ValueError(f"check: the anchors have {have} check=, inputs or a share.")
        parts = set_aside(checked_inputs(inputs), check, seed_of_step(self._seed, len(self)))
        new = parts.inputs
        check_forms("inputs", new, self.inputs)
        if parts.check is not None:
            check_forms("check", parts.check, self.inputs)
        reference = check_outputs(self.outputs(new))
        check_width(reference, self.reference)
        joined = concatenate([self.inputs, new])
        segments = _segments(count_inputs(new), len(self._networks))
        networks = [] if self.augment is None else [*self._networks, self.function.snapshot()]
        # All of the above may fail, so nothing is assigned before.
        if self.check is not None and parts.check is not None:
            self.check.extend(parts.check)
        self._segments = torch.cat([self._segments, segments])
        self.reference = torch.cat([self.reference, reference.to(self.reference)])
        self.inputs, self._networks = joined, networks
        self.route.mixing = None

    def fingerprint(self) -> Fingerprint:
        """Numbers by which the reference outputs are known again: equal up to rounding if, and only if, these are.

        The outputs of check inputs belong to them.

        An optimizer's state carries them, so that a resumed run cannot take another reference for its own.
        """
        counted = [] if self.check is None else [self.check.reference]
        return fingerprint_of(torch.cat([self.reference, *counted]))

    # --- what a step sees -----------------------------------------------------------------------------

    def all(self) -> Sample:
        """All anchors, plain."""
        return Sample(self.inputs, self.reference)

    @torch.inference_mode(False)
    def sample(self, step: int) -> Sample:
        """The anchors of step number ``step``, drawn and augmented if asked for; the same at every call."""
        if self.batch_size is None and self.augment is None:
            return self.all()
        seed = seed_of_step(self._seed, step)
        index = drawn(len(self), self.batch_size, seed)
        if self.augment is None:
            reference = self.reference[index.to(self.reference.device)]
            return Sample(select_inputs(self.inputs, index), reference)
        parts: list[Inputs] = []
        references: list[Tensor] = []
        with seeded(seed, self.device), torch.no_grad():
            # Anchors of different reference networks are augmented and evaluated apart.
            for segment in self._segments[index].unique().tolist():
                chosen = select_inputs(self.inputs, index[self._segments[index] == segment])
                new = checked_inputs(self.augment(chosen))
                parts.append(new)
                references.append(check_outputs(self.outputs(new, self._networks[segment])))
        return Sample(concatenate(parts), torch.cat(references))

    # --- the function ---------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The network, without wrappers."""
        return self.function.model

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.function.device

    def weights(self) -> Weights:
        """The weights of now; see :meth:`NetworkFunction.weights`."""
        return self.function.weights()

    def call(self, inputs: Inputs, weights: Weights) -> Tensor:
        """The outputs ``z`` ``(N, m)``, differentiable in ``weights``; see :meth:`NetworkFunction.call`."""
        return self.function.call(inputs, weights)

    def outputs(self, inputs: Inputs, weights: Weights | None = None) -> Tensor:
        """The outputs ``z`` ``(N, m)`` of ``inputs``, without a graph; None is the weights of now."""
        return self.function.outputs(self.progress(self.chunks(inputs)), weights)

    def chunks(self, inputs: Inputs) -> list[Inputs]:
        """``inputs`` in parts of at most ``chunk_size``."""
        return split_inputs(inputs, self.chunk_size or count_inputs(inputs))

    def padding_rows(self) -> dict[str, list[int]]:
        """The padding rows of tables of embeddings, by name; see :meth:`NetworkFunction.padding_rows`."""
        return self.function.padding_rows(self.inputs)

    def _first_outputs(self) -> Tensor:
        try:
            return self.function.first_outputs(lambda: self.progress(self.chunks(self.inputs)))
        except TypeError as error:
            refuse_call(self.model, self.inputs, error)
            raise

    # --- saving -----------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def state_dict(self) -> dict[str, Any]:
        """The state for a resumed run: a copy of inputs, reference outputs, reference networks and the draws' seed.

        Loads with ``torch.load(weights_only=True)``.
        """
        return self._state().to_dict()

    def _state(self) -> AnchorState:
        own = self.inputs, self.reference, self._networks, self._segments, self._seed, self.route
        return AnchorState(*own, None if self.check is None else self.check._state())

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, so that a resumed run goes on along the same path.

        Raises:
            ValueError: If ``state`` is not of the form that :meth:`state_dict` gives, belongs to another model or
                output space, or holds NaN or infinite values. The anchors are then as they were.
        """
        loaded = AnchorState.from_dict(
            state,
            self.function,
            like=self.reference,
            batch_size=self.batch_size,
            augmented=self.augment is not None,
            checked=self.check is not None,
        )
        self._take_over(loaded)

    def _take_over(self, loaded: AnchorState) -> None:
        self.inputs, self.reference = loaded.inputs, loaded.reference
        self._networks, self._segments = loaded.networks, loaded.segments
        self._seed, self.route = loaded.seed, loaded.route
        if self.check is not None and loaded.check is not None:
            self.check._take_over(loaded.check)


def _segments(count: int, number: int = 0) -> Tensor:
    """The number of the reference network of each of ``count`` anchors, which share one."""
    return torch.full((count,), number, dtype=torch.long, device="cpu")
