"""Anchors: the inputs on which a network's function must not change, and how far it has drifted there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Self
from weakref import WeakSet

import torch
from torch import Generator, Tensor, nn

from fipoptim.anchors.batches import checked_inputs, inputs_from_loader, joined
from fipoptim.anchors.bundle import (
    CLASSES,
    Bundle,
    count_positions,
    joined_classes,
    mask_of,
    with_classes,
    without_classes,
)
from fipoptim.anchors.draws import draw_seed, seed_of_step
from fipoptim.anchors.evaluation import seeded, unwrap
from fipoptim.anchors.fingerprint import Fingerprint, combined, fingerprint_of
from fipoptim.anchors.inputs import (
    GivenInputs,
    Inputs,
    check_forms,
    concatenate,
    count_inputs,
    refuse_call,
    rows_of,
    select_inputs,
)
from fipoptim.anchors.networks import (
    OtherModule,
    ReferenceNetwork,
    likely_classes,
    network_of,
    snapshot_of,
)
from fipoptim.anchors.output_space import OF_PROBABILITIES, OutputMap
from fipoptim.anchors.reference import check_rows, first_references, references_of
from fipoptim.anchors.refusals import (
    check_callable,
    check_positive,
    check_store,
    check_width,
)
from fipoptim.anchors.route import Route
from fipoptim.anchors.sample import Sample, augmented_apart, by_segment, drawn, set_aside
from fipoptim.anchors.saved import SavedInputs
from fipoptim.anchors.sharded import network_function
from fipoptim.anchors.shared import check_enough, ranks_of, refuse_differing
from fipoptim.anchors.texts import check_ids, check_padding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# By this a certificate finds out that it was asked for on anchors.
_IN_MEMORY: WeakSet[AnchorBatch] = WeakSet()


class AnchorBatch(SavedInputs):
    r"""The inputs whose outputs a network is to keep, and the outputs they had at the reference.

    The outputs that the model has on construction become the reference, unless another one is given. The model is
    always evaluated in eval mode, without autocast; its mode, its buffers and the random state are left as they were.

    Args:
        model: The network. The inner module is used behind DistributedDataParallel or ``torch.compile``.
        inputs: The anchors along dimension 0: a tensor, a tuple of tensors (positional inputs), a dict of
            tensors (keyword inputs), or a **list of batches** of any of these. They may live on another device than the
            model. Texts of different lengths are a list of dicts, each padded by itself, with an ``attention_mask``
            ``(N, T)`` of 0 and 1; each evaluation is cut to the longest of its texts.
        check: Inputs on which budgets count and which no step sees, in the form of ``inputs``; or the share of
            ``inputs`` that is set aside for this. How far the function moves on inputs that steps hold says little
            about others. With None budgets count on the anchors themselves.
        output: The space in which outputs are compared: ``"logits"`` (Euclidean), ``"probabilities"``
            (:math:`2\sqrt{\text{softmax}}`, the Fisher metric; classes in the last dimension), ``"nats_per_token"``
            (the same for models of language, scaled so that the drift is the KL divergence in nats per token, to second
            order), or a callable that gives a float tensor with one row per anchor. It gets what the model returns; if
            two of its positional arguments have no default, it also gets the inputs of the same rows, on the model's
            device. **Padded positions do not count**: with an ``attention_mask`` ``(N, T)``, outputs ``(N, T, ...)`` of
            three dimensions or more are 0 there. Other outputs, such as pooled ones, are left alone.
        reference: Another network whose outputs are the reference, such as the one before a training that has already
            taken place; a callable that returns a context manager in which the model itself is the reference, such as
            PEFT's ``model.disable_adapter``; or the outputs themselves, ``(N, m)`` in the output space. With
            ``augment`` it must be a network of the model's architecture. None takes the model as it is now.
        store: How the reference is kept. ``"full"``: the outputs, N m numbers. ``"half"``: the outputs in float16, half
            of that; rounding alone is a drift of about :math:`4\cdot10^{-8} \|z_{ref}\|^2`. ``"live"``: no outputs;
            the reference network gives them whenever they are wanted, which costs another forward pass. It is
            ``reference``, which must not change and of which nothing is copied, or with None a copy of the weights of
            now. **A number k**: at each position the k likeliest classes of the reference are told apart, and all
            others count as one, so that m is k + 1 for each position, in products too; for ``"probabilities"`` and
            ``"nats_per_token"``. A prediction is then the likeliest of these k; another class that overtakes them is
            not seen. In all of them :meth:`drift`, :meth:`measure` and :meth:`predictions_kept` hold the outputs of
            ``chunk_size`` anchors at a time.
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
        process_group: The processes that share the anchors: each rank gives all of them and evaluates its share. None
            takes the default group of torch.distributed, if it is initialized; False is this process by itself.

    Attributes:
        inputs: The anchors, copied: a tensor, a tuple or a dict.
        reference: Their reference outputs, shape ``(N, m)``. With ``store="live"`` they are computed when asked for.
        check: The check inputs as anchors of their own, or None: ``anchors.check.drift()`` is the drift there.

    Raises:
        TypeError: If an argument has the wrong type or the model's output is not a float tensor.
        ValueError: If there are no anchors, if tensors disagree on dimension 0, if a size is out of range, if the
            model's outputs are not finite, or if texts have labels, tokens that the model does not know, a mask that
            does not fit, or outputs that depend on their padding; if ranks give different anchors, or too few to share.
        RuntimeError: If another rank refuses what it was given.
    """

    check: AnchorBatch | None

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        inputs: GivenInputs,
        *,
        check: GivenInputs | float | None = None,
        output: str | OutputMap = "logits",
        reference: nn.Module | Tensor | Callable[[], AbstractContextManager[Any]] | None = None,
        store: Literal["full", "half", "live"] | int = "full",
        batch_size: int | None = None,
        chunk_size: int | None = None,
        generator: Generator | None = None,
        augment: Callable[[Any], Any] | None = None,
        progress: Callable[[list[Inputs]], Iterable[Inputs]] | None = None,
        process_group: ProcessGroup | Literal[False] | None = None,
    ) -> None:
        ranks = ranks_of(process_group, model)
        with ranks.together("AnchorBatch"):
            if not isinstance(model, nn.Module):
                raise TypeError(f"model: must be a torch.nn.Module, got {type(model).__name__}.")
            sizes = {"batch_size": batch_size, "chunk_size": chunk_size}
            for name, size in sizes.items():
                check_positive(name, size, or_none=True)
            for name, function in (("augment", augment), ("progress", progress)):
                check_callable(name, function)
            check_store(store, reference, output, OF_PROBABILITIES)
            self.output, self.store = output, store
            self.batch_size, self.chunk_size = batch_size, chunk_size
            self.augment, self.progress = augment, progress or iter
            self.function = network_function(model, output, ranks)
            given, seed = self._known(checked_inputs(inputs)), draw_seed(generator)
        refuse_differing(ranks, model, given, reference, sizes)
        self._seed = ranks.first(seed)
        self.function.synchronize()
        parts = set_aside(given, check, self._seed)
        self.inputs: Inputs = parts.inputs
        count = len(self)
        if batch_size is not None and batch_size > count:
            raise ValueError(f"batch_size: {batch_size} is more than the {count} anchors given.")
        check_enough(ranks, inputs=count, batch_size=batch_size)
        self.route = Route()
        reference, of_check = references_of(reference, parts)
        self._first_reference(reference)
        self.check = None
        if parts.check is not None:
            check_forms("check", parts.check, self.inputs)
            if store == "live":
                (of_check,) = self.references.networks
            how: dict[str, Any] = {"chunk_size": chunk_size, "progress": progress, "store": store}
            how |= {"output": output, "reference": of_check, "process_group": process_group}
            self.check = AnchorBatch(model, parts.check, **how)
            if count_positions(self.check.inputs) == count_positions(self.inputs):
                check_width(self.check.references.like, self.references.like)
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
        ``label``. Texts may have another length in each batch, if they have an ``attention_mask``. ``options`` are
        those of :class:`AnchorBatch`.

        Raises:
            ValueError: If ``n`` is not positive or the loader yields fewer than ``n`` inputs.
        """
        return cls(model, inputs_from_loader(loader, n), **options)

    def __repr__(self) -> str:
        """One line: how many anchors, in which output space, and how they are evaluated."""
        return (
            f"AnchorBatch({len(self)} anchors, {self.width} outputs each, "
            f"{'no' if self.check is None else len(self.check)} check inputs, output={self.output!r}, "
            f"batch_size={self.batch_size}, chunk_size={self.chunk_size}, augment={self.augment!r}, "
            f"store={self.store!r}{self._padding_told()})"
        )

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
        self.function.synchronize()
        self._refresh(snapshot_of(self.function) if self.takes_networks else None)

    def _refresh(self, network: ReferenceNetwork | None) -> None:
        inputs = self._told_apart(without_classes(self.inputs), OtherModule(self.function))
        references = self.references_of_now(inputs, network)
        if self.check is not None:
            self.check._refresh(network if self.store == "live" else None)
        self.inputs, self.references = inputs, references
        self.route.mixing = None  # the model may be another

    @torch.inference_mode(False)
    def extend(
        self,
        inputs: GivenInputs,
        *,
        check: GivenInputs | float | None = None,
    ) -> None:
        """Add anchors with today's outputs as their reference; the anchors already here keep theirs.

        With ``augment``, and with ``store="live"``, a further copy of the network is kept. Texts may be longer than
        those already here.

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
        refuse_differing(self.ranks, self.model, parts.inputs, None, {})
        self.function.synchronize()
        network = snapshot_of(self.function) if self.takes_networks else None
        self._extend(parts.inputs, parts.check, network)

    def _extend(self, new: Inputs, check: Inputs | None, network: ReferenceNetwork | None) -> None:
        check_forms("inputs", new, self.inputs)
        if check is not None:
            check_forms("check", check, self.inputs)
        before, after = count_positions(self.inputs), count_positions(new)
        everything = self._known(joined([without_classes(self.inputs), new]))
        if isinstance(everything, Bundle):  # outputs of the width that all texts have now
            new = select_inputs(everything, torch.arange(len(self), count_inputs(everything)))
        new = self._told_apart(new, OtherModule(self.function))
        if isinstance(new, Bundle) and CLASSES in new:
            everything = with_classes(everything, joined_classes(self.inputs, new))
        added, references = self.references_of_now(new, network), self.references
        if before != after and before is not None and getattr(everything, "positional", False):
            references = references.lengthened(before, count_positions(everything) or before)
        check_width(added.like, references.like)
        extended = references.extended(added.outputs, network, count_inputs(new))
        # All of the above may fail, so nothing is assigned before.
        if self.check is not None and check is not None:
            self.check._extend(check, None, network if self.store == "live" else None)
        self.inputs, self.references = everything, extended
        self.route.mixing = None

    def fingerprint(self) -> Fingerprint:
        """Numbers by which the reference outputs are known again: equal up to rounding if, and only if, these are.

        The outputs of check inputs belong to them.

        An optimizer's state carries them, so that a resumed run cannot take another reference for its own.
        """
        own = self.references
        if self.check is None:
            return own.fingerprint(self.inputs, self.chunks)
        counted = self.check.references
        if own.outputs is not None and counted.outputs is not None and own.width == counted.width:
            return fingerprint_of(torch.cat([own.outputs, counted.outputs]))
        return combined(
            own.fingerprint(self.inputs, self.chunks),
            counted.fingerprint(self.check.inputs, self.chunks),
        )

    # --- what a step sees -----------------------------------------------------------------------------

    def all(self) -> Sample:
        """All anchors, plain: of them, those that this rank evaluates."""
        return Sample(self.own, self.own_reference)

    @torch.inference_mode(False)
    def sample(self, step: int) -> Sample:
        """The anchors of step number ``step``, drawn and augmented if asked for; the same at every call.

        All ranks draw and augment the same anchors, and each gets its share of them.
        """
        if self.batch_size is None and self.augment is None:
            return self.all()
        seed = seed_of_step(self._seed, step)
        index = drawn(len(self), self.batch_size, seed)
        if self.augment is None:
            index = index[self.ranks.share(len(index))]
            chosen = select_inputs(self.inputs, index)
            return Sample(chosen, self.references.of(chosen, index, self.in_chunks))
        chosen, segments = select_inputs(self.inputs, index), self.references.segments[index]
        with seeded(seed, self.device), torch.no_grad():
            views, segments = augmented_apart(self.augment, chosen, segments)
            own = self.ranks.share(len(segments))
            views, segments = rows_of(views, own), segments[own]
            if isinstance(self.store, int):
                networks = self.references.networks
                views = concatenate(
                    [
                        self._told_apart(select_inputs(views, rows), networks[k], by_shares=False)
                        for k, rows in by_segment(segments)
                    ]
                )
            return Sample(views, self.references.by_networks(views, segments, self.in_chunks))

    def _first_reference(self, reference: Any) -> None:
        try:
            if isinstance(self.store, int):
                network: ReferenceNetwork = OtherModule(self.function)
                if reference is not None:
                    network = network_of(reference, self.function, self.output)
                self.inputs = self._told_apart(self.inputs, network)
            if isinstance(reference, Tensor):
                check_rows(reference, len(self))
                reference = reference[self.own_rows]
            with self.ranks.together("AnchorBatch"):
                references = first_references(
                    self.function,
                    self.own,
                    lambda: self.in_chunks(self.own),
                    reference=reference,
                    output=self.output,
                    store=self.store,
                    augmented=self.augment is not None,
                )
            self.references = references.of_all(self.ranks, len(self))
        except TypeError as error:
            refuse_call(self.model, self.inputs, error)
            raise

    def _told_apart(
        self, inputs: Inputs, network: ReferenceNetwork, *, by_shares: bool = True
    ) -> Inputs:
        """Inputs with the classes that their outputs tell apart, if the store is a number of them."""
        if not isinstance(self.store, int):
            return inputs
        classes = functools.partial(
            likely_classes, network=network, k=self.store, split=self.in_chunks
        )
        found = self._by_shares(inputs, classes) if by_shares else classes(inputs)
        return with_classes(inputs, found)

    def _known(self, inputs: Inputs) -> Inputs:
        """Inputs themselves, if the model has their tokens; texts of different lengths with how they are read."""
        check_ids(self.model, inputs)
        if not isinstance(inputs, Bundle) or inputs.positional is not None:
            return inputs
        try:
            return inputs.like(inputs, positional=check_padding(self.function.shaped, inputs))
        except TypeError as error:
            refuse_call(self.model, inputs, error)
            raise

    def _padding_told(self) -> str:
        """What is said of padded positions, which do not count."""
        mask = mask_of(self.inputs)
        return "" if mask is None else f", {int(mask.sum())} positions that count"
