"""The traces that were made of one model's derivative, beside the anchors for which they were made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.inputs import Inputs, map_inputs, named_tensors
from fipoptim.anchors.network_function import Weights
from fipoptim.anchors.route import Route
from fipoptim.metric.behaviour import behaviour_of
from fipoptim.metric.blocks import on_device, prefers_channels_last
from fipoptim.metric.chunks import EagerChunk, TracedChunk
from fipoptim.metric.graph_passes import NotTraceable
from fipoptim.metric.point import Point
from fipoptim.metric.trace import Traced
from fipoptim.metric.tracing import say_untraced, traced


@dataclass
class TraceCache:
    """The traced derivatives of one model on one set of anchors.

    Attributes:
        by_shape: The traces by the shapes of all tensors that they read; None for shapes without a right trace.
        behaviours: What the attributes of the model's modules said when each trace was last compared with the model.
    """

    by_shape: dict[Hashable, Traced | None] = field(default_factory=dict)
    behaviours: dict[Traced, Hashable] = field(default_factory=dict)

    def forget(self) -> None:
        """Start over."""
        self.by_shape.clear()
        self.behaviours.clear()

    def chunk(
        self,
        point: Point,
        inputs: Inputs,
        route: Route,
        run: Callable[[], EagerChunk],
        *,
        compile: bool,
    ) -> TracedChunk | None:
        """Linearize ``inputs`` at ``point`` by a trace; a new one is made if there is none for their shapes.

        Args:
            point: The weights.
            inputs: Some anchors.
            route: Says whether a new shape is traced, and takes note of it.
            run: Linearizes the same inputs by running the model; the chunk calls it if the trace fails in a product.
            compile: Compile a new trace.

        Returns:
            The chunk, or None if no trace can be trusted.
        """
        variables = list(point.parameters.values())
        constants = _constants(point, inputs, route)
        shapes = tuple((x.shape, x.stride(), x.dtype, x.device) for x in (*variables, *constants))
        key = (id(point.network.model), tuple(point.names), shapes, compile)
        if key not in self.by_shape:
            if not route.admits(_digest(point, shapes)):
                return None
            name, function = type(point.network.model).__name__, _function(point, inputs)
            try:
                found = traced(name, function, variables, constants, compile=compile)
                self.by_shape[key] = found
                self.behaviours[found] = behaviour_of(point.network.model)
            except NotTraceable as why:
                if route.channels_last and prefers_channels_last(point):
                    route.channels_last = False
                    return self.chunk(point, inputs, route, run, compile=compile)
                say_untraced(name, why)
                self.by_shape[key] = None
        of_shape = self.by_shape[key]
        if of_shape is None:
            return None
        try:
            return TracedChunk(of_shape, variables, constants, run)
        except RuntimeError:
            # The model computes something else for these values than for those it was traced with.
            self.by_shape[key] = None
            return None


# The caches are beside the anchors rather than in them, because a trace can be neither copied nor pickled.
CACHES: WeakKeyDictionary[AnchorBatch, TraceCache] = WeakKeyDictionary()


def traces_of(anchors: AnchorBatch) -> TraceCache:
    """The cache of these anchors, which lives as long as they do."""
    return CACHES.setdefault(anchors, TraceCache())


def _constants(point: Point, inputs: Inputs, route: Route) -> list[Tensor]:
    """All tensors that the outputs depend on, other than the parameters to differentiate by."""
    last = route.channels_last and prefers_channels_last(point)
    on = on_device(inputs, point.network.device, channels_last=last)
    weights = [x for part in point.others for x in part.values()]
    return weights + list(named_tensors(on).values())


def _function(point: Point, inputs: Inputs) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    """The outputs of inputs of this form as a function of the variables and the constants of a trace."""
    network, names, others = point.network, point.names, point.others

    def function(variables: list[Tensor], constants: list[Tensor]) -> Tensor:
        values = iter(constants)
        weights = Weights(*({name: next(values) for name in part} for part in others))
        weights.parameters.update(zip(names, variables, strict=True))
        return network.call(map_inputs(lambda _: next(values), inputs), weights)

    return function


def _digest(point: Point, shapes: tuple[tuple[Any, ...], ...]) -> str:
    """A short text that stands for the shapes of a trace, on any machine."""
    text = repr((list(point.names), [(tuple(s), st, str(d), dev.type) for s, st, d, dev in shapes]))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
