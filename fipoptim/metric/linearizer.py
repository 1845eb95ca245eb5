"""The network linearized on a step's anchors: block by block, by a trace of the derivative or as the model runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.inputs import Inputs, count_inputs, first_inputs, split_inputs
from fipoptim.anchors.network_function import Weights
from fipoptim.anchors.sharded import ShardedFunction
from fipoptim.metric.behaviour import behaviour_of, random_state, refuse_random
from fipoptim.metric.blocks import block_size, on_device, prefers_channels_last
from fipoptim.metric.chunks import Chunk, EagerChunk, Form, ShardedChunk, TracedChunk
from fipoptim.metric.compare import close
from fipoptim.metric.guard import WeightGuard
from fipoptim.metric.point import Point
from fipoptim.metric.trace import Traced
from fipoptim.metric.trace_cache import traces_of


class Linearizer:
    """The outputs of some anchors as linear functions of the parameters, at the weights that the model has now.

    If all anchors fit into one chunk of the anchors' ``chunk_size``, what the products need is kept. Otherwise each
    pass over :meth:`chunks` evaluates the model again, and the memory is that of one chunk.

    Args:
        anchors: The anchors; the traces are kept beside them.
        inputs: The anchors to evaluate, all or some of them.
        names: The parameters to differentiate by.
        form: How Jacobian-vector products are taken as the model runs; None if none will be asked for.
        trace: Trace the forward form. A model that cannot be traced is run.
        compile: Compile the traces.
        guard: Keep a copy of the parameters, to notice every change of them.

    Attributes:
        point: The weights, as a function of the parameters to differentiate by.
        inputs: The anchors, as given.
        blocks: The inputs in the parts that are linearized at a time.
        outputs: The outputs ``z``, shape ``(N, m)``.
        traced: Whether all blocks are linearized by a trace.
        form: How Jacobian-vector products are taken, as given.

    Raises:
        ValueError: If the model is random in eval mode.
    """

    def __init__(
        self,
        anchors: AnchorBatch,
        inputs: Inputs,
        names: Sequence[str],
        *,
        form: Form | None,
        trace: bool,
        compile: bool,
        guard: bool,
    ) -> None:
        self.point = Point(anchors.function, anchors.weights(), names)
        self.traced = trace and form == "forward"
        self.outputs: Tensor
        self._anchors, self.inputs = anchors, inputs
        # Of a fully sharded network there are no other products.
        self.form = "finite-difference" if self.sharded else form
        # Attention needs another kernel where it is differentiated in forward mode, or twice.
        self._tangents = self.form in ("forward", "double-vjp")
        self._compile = compile
        self._guard = WeightGuard(anchors.model, copies=guard)
        self._reused: list[Chunk] | None = None
        with self.point.network.evaluation(tangents=self._tangents):
            self.blocks = self._in_blocks()
            self._linearize()
            if self._is_stale():
                traces_of(anchors).forget()
                anchors.route.found_stale()
                self._linearize()

    def evaluation(self, *, tangents: bool | None = None) -> AbstractContextManager[None]:
        """The context in which chunks are used.

        Args:
            tangents: Whether attention is computed by the kernel that can be differentiated in forward mode and twice;
                None if the form of the products asks for it.

        Raises:
            RuntimeError: If the model's weights have changed.
        """
        self._guard.check()
        if tangents is None:
            tangents = self._tangents
        return self.point.network.evaluation(tangents=tangents)

    def chunks(self) -> Iterable[Chunk]:
        """The blocks, linearized; inside :meth:`evaluation`."""
        return self._made() if self._reused is None else self._reused

    def outputs_at(self, weights: Weights) -> Tensor:
        """The outputs ``z`` ``(N, m)`` of the same anchors at other weights, without a graph."""
        network = self.point.network
        last = (
            self.traced and self._anchors.route.channels_last and prefers_channels_last(self.point)
        )
        blocks = self._anchors.progress(self.blocks)
        return network.outputs(
            (on_device(block, network.device, channels_last=last) for block in blocks), weights
        )

    # --- linearizing --------------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        """Whether the network is fully sharded."""
        return isinstance(self.point.network, ShardedFunction)

    def _in_blocks(self) -> list[Inputs]:
        if self.sharded:  # all ranks have as many
            return self._anchors.chunks(self.inputs)
        count = count_inputs(self.inputs)
        size = min(count, self._anchors.chunk_size or count)
        smaller = block_size(self.point, size)
        # Anchors whose outputs depend on each other are the same function only in the chunks that drift() takes.
        if smaller < size and not self._outputs_mix():
            size = smaller
        return split_inputs(self.inputs, size)

    def _linearize(self) -> None:
        """Find today's outputs; keep what the products need if all anchors are evaluated at once."""
        network, anchors = self.point.network, self._anchors
        state = random_state(network.device)
        whole = anchors.chunk_size is None or count_inputs(self.inputs) <= anchors.chunk_size
        if whole or self.sharded:  # whose chunks keep no evaluation
            self._reused = None  # frees the earlier chunks
            self._reused = list(self._made())
        outputs = []
        # The first block that each trace was used for, and its outputs there, to compare with the model.
        self._first_of: dict[Traced, tuple[Inputs, Tensor]] = {}
        for block, chunk in zip(self.blocks, self.chunks(), strict=True):
            outputs.append(chunk.outputs)
            if isinstance(chunk, TracedChunk):
                self._first_of.setdefault(chunk.traced, (block, chunk.outputs))
            else:
                self.traced = False
            del chunk  # frees it before the next one is made
        self.outputs = torch.cat(outputs)
        if random_state(network.device) != state:
            refuse_random(network, anchors.chunks(self.inputs)[0])

    def _made(self) -> Iterator[Chunk]:
        return (self._linearized(block) for block in self._anchors.progress(self.blocks))

    def _linearized(self, inputs: Inputs) -> Chunk:
        network = self.point.network
        if isinstance(network, ShardedFunction):
            return ShardedChunk(network, self.point, inputs, keep=len(self.blocks) == 1)
        chunk = self._traced_chunk(inputs) if self.traced else None
        return self._to_run(inputs)() if chunk is None else chunk

    def _traced_chunk(self, inputs: Inputs) -> TracedChunk | None:
        """``inputs`` linearized by a trace, or None if no trace can be trusted."""
        route = self._anchors.route
        if not route.traces or self._outputs_mix():
            return None
        return traces_of(self._anchors).chunk(
            self.point, inputs, route, self._to_run(inputs), compile=self._compile
        )

    def _to_run(self, inputs: Inputs) -> Callable[[], EagerChunk]:
        """A function that linearizes ``inputs`` by running the model.

        Chunks keep it, so it must not refer to this object, which keeps the chunks: such a cycle would hold the memory
        of the evaluation until Python's garbage collector runs.
        """
        point = self.point
        return functools.partial(EagerChunk, point.function_on(inputs), point.parameters, self.form)

    # --- is the trace still that of the model? --------------------------------------------------------------

    def _is_stale(self) -> bool:
        """Whether a trace that was used differs from the model on the first two of its anchors."""
        if not self._first_of:
            return False
        behaviours, now = traces_of(self._anchors).behaviours, behaviour_of(self._anchors.model)
        for traced, (block, outputs) in self._first_of.items():
            if not self._agree_alone(block, outputs):
                return True
            # Outputs do not show that a part of the model was detached.
            if behaviours[traced] != now and self._derivative_differs(block):
                return True
            behaviours[traced] = now
        return False

    def _derivative_differs(self, block: Inputs) -> bool:
        """Whether the trace and the model have another J v for the first two anchors of ``block``."""
        chunk = self._traced_chunk(block)
        if chunk is None:
            return False
        seeded = torch.Generator("cpu").manual_seed(0)
        tangents = [
            torch.randn(p.shape, generator=seeded, dtype=p.dtype, device="cpu").to(p)
            for p in self.point.parameters.values()
        ]
        expected = self._to_run(first_inputs(block, 2))().jvp(tangents)
        return not close(chunk.jvp(tangents)[: len(expected)], expected, 1e-3)

    def _outputs_mix(self) -> bool:
        """Whether the outputs of an anchor depend on the other anchors, as with batch norm without running statistics.

        The answer is kept in the anchors' route.
        """
        route = self._anchors.route
        if route.mixing is None:
            first = self._anchors.chunks(self.inputs)[0]
            if count_inputs(first) <= 2:
                return False  # two anchors cannot tell
            with self.point.network.evaluation():
                route.mixing = not self._agree_alone(first, self.point.outputs(first))
        return bool(route.mixing)

    def _agree_alone(self, inputs: Inputs, outputs: Tensor) -> bool:
        """Whether the first two of ``inputs``, evaluated by themselves, have the first two rows of ``outputs``."""
        z = self.point.outputs(first_inputs(inputs, 2))
        return close(outputs[: len(z)], z, 1e-4 if z.dtype == torch.float32 else 1e-9)
