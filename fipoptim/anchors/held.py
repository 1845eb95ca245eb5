"""Inputs with a reference, and how far a network's function has moved there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fipoptim.anchors.inputs import Inputs, count_inputs, rows_of
from fipoptim.anchors.measured import Measured, measured_in_parts, predictions_kept
from fipoptim.anchors.network_function import NetworkFunction, Weights
from fipoptim.anchors.networks import ReferenceNetwork
from fipoptim.anchors.output_space import squared_distance
from fipoptim.anchors.reference import in_store
from fipoptim.anchors.references import References, segments_of
from fipoptim.anchors.refusals import check_outputs
from fipoptim.mean import AnchorMean
from fipoptim.ranks import Ranks


class HeldInputs:
    """Inputs whose outputs a network is to keep, and their reference. Passes over them go chunk by chunk.

    Several ranks hold the same inputs. Each evaluates its share of them, its **own** rows; means are those of all rows.
    Whatever measures is then a collective: all ranks have to call it.

    Attributes:
        inputs: The inputs, in one of the three forms.
        function: The function that the network computes.
        references: Their reference, however it is kept; another reference is another object.
        store: How the reference is kept.
        augment: The augmentation of steps, or None.
        chunk_size: Inputs evaluated at a time; None is all of them.
        progress: Wraps the list of chunks of every pass.
    """

    inputs: Inputs
    function: NetworkFunction
    references: References
    store: str | int
    augment: Callable[[Any], Any] | None
    chunk_size: int | None
    progress: Callable[[list[Inputs]], Iterable[Inputs]]

    def __len__(self) -> int:
        """The number of inputs."""
        return count_inputs(self.inputs)

    # --- the share of this rank -----------------------------------------------------------------------

    @property
    def ranks(self) -> Ranks:
        """The processes that share the inputs."""
        return self.function.ranks

    @property
    def mean(self) -> AnchorMean:
        """The mean over all inputs."""
        return AnchorMean(len(self), self.ranks)

    @property
    def own_rows(self) -> slice:
        """The numbers of the inputs that this rank evaluates."""
        return self.ranks.share(len(self))

    @property
    def own(self) -> Inputs:
        """The inputs that this rank evaluates: the same object as long as the inputs are."""
        if self.ranks.alone:
            return self.inputs
        if self._own is None or self._own[0] is not self.inputs:
            self._own = (self.inputs, rows_of(self.inputs, self.own_rows))
        return self._own[1]

    _own: tuple[Inputs, Inputs] | None = None

    @property
    def own_reference(self) -> Tensor:
        """The reference outputs of the inputs that this rank evaluates, ``(n, m)``."""
        if self.ranks.alone:
            return self.references.all(self.inputs, self.in_chunks)
        return self.references.of(self.own, self.own_rows, self.in_chunks)

    def _by_shares(self, inputs: Inputs, evaluated: Callable[[Inputs], Tensor]) -> Tensor:
        """What is ``evaluated`` of inputs, one row each; each rank evaluates a share, and gets all."""
        count = count_inputs(inputs)
        if self.ranks.alone or count < self.ranks.size:
            return evaluated(inputs)
        with self.ranks.together("anchors"):
            part = evaluated(rows_of(inputs, self.ranks.share(count)))
        return self.ranks.gathered(part, count)

    # --- how far the function has moved -------------------------------------------------------------

    @overload
    def drift(self, reduction: Literal["mean", "sum"] = "mean") -> float: ...
    @overload
    def drift(self, reduction: Literal["none"]) -> Tensor: ...
    def drift(self, reduction: str = "mean") -> float | Tensor:
        """Squared distance of today's outputs from the reference, :math:`‖z - z_{ref}‖²`, over all anchors.

        Args:
            reduction: ``"mean"`` or ``"sum"`` over the anchors (a float), or ``"none"`` (a tensor ``(N,)``).

        With several ranks this is a collective, as is every other measurement: all ranks have to call it.

        Raises:
            ValueError: If ``reduction`` is none of these.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: choose 'mean', 'sum' or 'none', got {reduction!r}.")
        squared = torch.cat([squared_distance(z, reference) for z, reference in self._compared()])
        if reduction == "none":
            return self.ranks.gathered(squared, len(self))
        if reduction == "sum":
            return self.ranks.sums(float(squared.sum()))[0]
        return self.mean.of_each(squared)

    def predictions_kept(self) -> float:
        """Fraction of anchors whose prediction is that of the reference.

        An anchor with outputs ``(C,)`` predicts the class of the largest output. With outputs ``(T, C)``, as those of a
        token classifier, it predicts one class at each of the T positions, and with feature maps ``(C, H, W)`` one
        class at each pixel: all of them have to be the same. A single output predicts by its sign; with
        ``output="probabilities"`` it predicts the likelier of the two classes. With a callable ``output`` the same
        holds for what the callable returns. Padded positions of texts count as kept. With a number as ``store`` the
        classes are those that are told apart.
        """
        kept = [predictions_kept(*pair, self.function.row_shape) for pair in self._compared()]
        return self.mean.of_each(torch.cat(kept).double())

    def measure(self, outputs: Tensor | None = None) -> Measured:
        """Drift and changed predictions over all anchors, in one evaluation.

        Args:
            outputs: The outputs of the anchors that this rank evaluates, ``(N, m)``; None evaluates the model of now.
        """
        parts: Iterable[tuple[Tensor, Tensor]] = self._compared(outputs)
        if outputs is not None and self.references.outputs is not None:
            parts = [(outputs, self.own_reference)]
        return measured_in_parts(parts, lambda: self.function.row_shape, self.mean)

    def _compared(self, outputs: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs of now, or those given, and their reference, both ``(n, m)``, chunk by chunk."""
        if outputs is None:
            self.function.synchronize()
        weights = self.weights() if outputs is None else None
        start, first = 0, self.own_rows.start
        for chunk in self.progress(self.chunks(self.own)):
            rows = slice(start, start + count_inputs(chunk))
            z = self.function.outputs([chunk], weights) if outputs is None else outputs[rows]
            there = slice(first + rows.start, first + rows.stop)
            yield z, self.references.of(chunk, there, self.chunks)
            del z  # frees it before the next one is made
            start = rows.stop

    # --- how the reference is kept ----------------------------------------------------------------------

    @property
    def reference(self) -> Tensor:
        """The reference outputs of all anchors, ``(N, m)``: the tensor that is kept if it is in full precision."""
        if self.ranks.alone or self.references.outputs is not None:
            return self.references.all(self.inputs, self.in_chunks)
        return self.ranks.gathered(self.own_reference, len(self))

    @property
    def width(self) -> int:
        """The number m of outputs an anchor."""
        return self.references.width

    def reference_parts(self) -> Iterator[Tensor]:
        """The reference outputs of this rank's own inputs in parts ``(n, m)``, of which one is held at a time."""
        return self.references.parts(self.own, self.own_rows, self.in_chunks)

    @property
    def takes_networks(self) -> bool:
        """Whether networks give reference outputs."""
        return self.augment is not None or self.store == "live"

    def references_of_now(self, inputs: Inputs, network: ReferenceNetwork | None) -> References:
        """Today's outputs as the reference of ``inputs``.

        Raises:
            ValueError: If they are not finite.
        """
        networks = [] if network is None else [network]
        segments = segments_of(count_inputs(inputs))
        if self.store == "live":
            return References(None, self._like(inputs), networks, segments)
        outputs = check_outputs(self._by_shares(inputs, self.outputs))
        return References(in_store(outputs, self.store), outputs[:0].clone(), networks, segments)

    def _like(self, inputs: Inputs) -> Tensor:
        """A tensor ``(0, m)`` like the outputs of inputs, all of which are evaluated and have to be finite."""
        like: list[Tensor] = []

        def not_a_number_if_not_finite(own: Inputs) -> Tensor:
            found = []
            for chunk in self.in_chunks(own):
                z = self.function.outputs([chunk])
                found.append((z * 0).sum(dim=1))
                like[:] = [z[:0].clone()]
                del z
            return torch.cat(found)

        check_outputs(self._by_shares(inputs, not_a_number_if_not_finite))
        return like[0]

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
        return self.function.outputs(self.in_chunks(inputs), weights)

    def chunks(self, inputs: Inputs) -> list[Inputs]:
        """``inputs`` in parts of at most ``chunk_size``."""
        return self.function.divided(inputs, self.chunk_size)

    def in_chunks(self, inputs: Inputs) -> Iterable[Inputs]:
        """The chunks of ``inputs``, as ``progress`` yields them."""
        return self.progress(self.chunks(inputs))

    def padding_rows(self) -> dict[str, list[int]]:
        """The padding rows of tables of embeddings, by name; see :meth:`NetworkFunction.padding_rows`."""
        return self.function.padding_rows(self.inputs)
