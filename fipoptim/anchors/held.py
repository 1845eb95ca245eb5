"""Inputs with a reference, and how far a network's function has moved there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fipoptim.anchors.inputs import Inputs, count_inputs, split_inputs
from fipoptim.anchors.measured import Measured, measured, measured_in_parts, predictions_kept
from fipoptim.anchors.network_function import NetworkFunction, Weights
from fipoptim.anchors.networks import ReferenceNetwork
from fipoptim.anchors.output_space import squared_distance
from fipoptim.anchors.reference import in_store
from fipoptim.anchors.references import References, segments_of
from fipoptim.anchors.refusals import check_outputs
from fipoptim.mean import AnchorMean


class HeldInputs:
    """Inputs whose outputs a network is to keep, and their reference. Passes over them go chunk by chunk.

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
    store: str
    augment: Callable[[Any], Any] | None
    chunk_size: int | None
    progress: Callable[[list[Inputs]], Iterable[Inputs]]

    def __len__(self) -> int:
        """The number of inputs."""
        return count_inputs(self.inputs)

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
        squared = torch.cat([squared_distance(z, reference) for z, reference in self._compared()])
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
        kept = [predictions_kept(*pair, self.function.row_shape) for pair in self._compared()]
        return float(AnchorMean(len(self)).of(torch.cat(kept).double()))

    def measure(self, outputs: Tensor | None = None) -> Measured:
        """Drift and changed predictions over all anchors, in one evaluation.

        Args:
            outputs: The outputs of all anchors, ``(N, m)``; None evaluates the model of now.
        """
        if outputs is not None and self.references.outputs is not None:
            return measured(outputs, self.reference, self.function.row_shape)
        return measured_in_parts(self._compared(outputs), lambda: self.function.row_shape)

    def _compared(self, outputs: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs of now, or those given, and their reference, both ``(n, m)``, chunk by chunk."""
        weights = self.weights() if outputs is None else None
        start = 0
        for chunk in self.progress(self.chunks(self.inputs)):
            rows = slice(start, start + count_inputs(chunk))
            z = self.function.outputs([chunk], weights) if outputs is None else outputs[rows]
            yield z, self.references.of(chunk, rows, self.chunks)
            del z  # frees it before the next one is made
            start = rows.stop

    # --- how the reference is kept ----------------------------------------------------------------------

    @property
    def reference(self) -> Tensor:
        """The reference outputs of all anchors, ``(N, m)``: the tensor that is kept if it is in full precision."""
        return self.references.all(self.inputs, self.in_chunks)

    @property
    def width(self) -> int:
        """The number m of outputs an anchor."""
        return self.references.width

    def reference_parts(self) -> Iterator[Tensor]:
        """The reference outputs of all anchors in parts ``(n, m)``, of which one is held at a time."""
        return self.references.parts(self.inputs, self.in_chunks)

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
            like: Tensor | None = None
            for chunk in self.in_chunks(inputs):
                like = check_outputs(self.function.outputs([chunk]))[:0].clone()
            assert like is not None
            return References(None, like, networks, segments)
        outputs = check_outputs(self.outputs(inputs))
        return References(in_store(outputs, self.store), outputs[:0].clone(), networks, segments)

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
        return split_inputs(inputs, self.chunk_size or count_inputs(inputs))

    def in_chunks(self, inputs: Inputs) -> Iterable[Inputs]:
        """The chunks of ``inputs``, as ``progress`` yields them."""
        return self.progress(self.chunks(inputs))

    def padding_rows(self) -> dict[str, list[int]]:
        """The padding rows of tables of embeddings, by name; see :meth:`NetworkFunction.padding_rows`."""
        return self.function.padding_rows(self.inputs)
