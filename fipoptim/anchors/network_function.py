"""A network as a function of its inputs and its weights: the model, followed by the map into the output space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fipoptim.anchors.bundle import CLASSES, Bundle, call_form, without_padding
from fipoptim.anchors.embedding import PureLookups
from fipoptim.anchors.evaluation import device_of, evaluation, unwrap
from fipoptim.anchors.inputs import Inputs, copied_to, count_inputs, first_inputs, split_inputs
from fipoptim.anchors.output_space import OutputMap, flatten_outputs, output_map, told_apart
from fipoptim.ranks import ALONE, Ranks
from fipoptim.shards import local, named_parameters


class Weights(NamedTuple):
    """A network's numbers: its parameters and its buffers by name."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


class NetworkFunction:
    """The outputs ``z(x; w)``, shape ``(N, m)``, of a model in an output space.

    Args:
        model: The network. The inner module is used behind DistributedDataParallel or ``torch.compile``.
        output: The output space, as for :class:`~fipoptim.AnchorBatch`.
        ranks: The processes that evaluate their shares of the same inputs.

    Attributes:
        model: The inner module.
        ranks: As given.
        row_shape: The shape that the outputs of one input have in the output space, as last evaluated.

    Raises:
        ValueError: If ``output`` is an unknown name.
        TypeError: If ``output`` is neither a name nor callable.
    """

    def __init__(self, model: nn.Module, output: str | OutputMap, ranks: Ranks = ALONE) -> None:
        self.model = unwrap(model)
        self.ranks = ranks
        # The buffers of this rank when they were last compared, with their versions, and those of rank 0 then.
        self._compared: list[tuple[Tensor, int]] = []
        self._buffers: dict[str, Tensor] | None = None
        self._map = output_map(output)
        self._writes_buffers = False
        self.row_shape = torch.Size()
        self._padding_rows: dict[str, list[int]] | None = None  # None until they are looked for

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return device_of(self.model)

    def evaluation(self, *, tangents: bool = False) -> AbstractContextManager[None]:
        """The context in which the model is evaluated; see :func:`fipoptim.anchors.evaluation.evaluation`."""
        return evaluation(self.model, self.device, tangents=tangents)

    @torch.inference_mode(False)
    def synchronize(self) -> None:
        """Take the buffers of rank 0 from now on, as the forward pass of DistributedDataParallel does.

        Every measurement and every linearization begins with it, on all ranks. The model's own buffers stay.

        Raises:
            RuntimeError: If there are several processes now, and there was one when the anchors were built.
        """
        self.ranks.refuse_outgrown()
        if self.ranks.alone:
            return
        named, before = dict(self.model.named_buffers()), self._compared
        if not named:
            return
        same = len(named) == len(before) and all(
            b is old and b._version == version
            for b, (old, version) in zip(named.values(), before, strict=True)
        )
        if self.ranks.any(not same):
            found = self.ranks.of_first(b.detach() for b in named.values())
            self._buffers = dict(zip(named, found, strict=True))
            self._compared = [(b, b._version) for b in named.values()]

    @torch.inference_mode(False)
    def weights(self) -> Weights:
        """The weights of now: detached aliases of the parameters, and copies of the buffers.

        A model that writes to its buffers cannot change the copies. With several ranks the buffers are those of rank 0,
        as they were at the last :meth:`synchronize`.
        """
        buffers = dict(self.model.named_buffers()) if self._buffers is None else self._buffers
        return Weights(
            {name: local(p.detach()) for name, p in named_parameters(self.model).items()},
            {name: b.detach().clone() for name, b in buffers.items()},
        )

    def snapshot(self) -> Weights:
        """A copy of the weights of now, which later steps do not change."""
        parameters, buffers = self.weights()
        return Weights({name: p.clone() for name, p in parameters.items()}, buffers)

    def call(self, inputs: Inputs, weights: Weights) -> Tensor:
        """The outputs ``z`` ``(N, m)`` of ``inputs``, differentiable in ``weights``; inside :meth:`evaluation`.

        The model gets a copy of the inputs, which it may write to.
        """
        return flatten_outputs(self.mapped(inputs, weights), count_inputs(inputs))

    def mapped(self, inputs: Inputs, weights: Weights, lookups: PureLookups | None = None) -> Any:
        """The output map's result on the model's outputs, neither checked nor flattened; inside :meth:`evaluation`.

        It is 0 at the padded positions of texts.
        """
        given = call_form(copied_to(self.device, inputs))
        if self._writes_buffers:
            weights = weights._replace(buffers={k: b.clone() for k, b in weights.buffers.items()})
        args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
        args = (args,) if isinstance(args, Tensor) else args
        with lookups or PureLookups():
            result = self._called(args, kwargs, weights)
        own: Inputs | None = None
        if self._map.takes_inputs:  # another copy, as the model may have written to its own
            own = call_form(copied_to(self.device, inputs))
        z = self._map(result, own)
        if isinstance(inputs, Bundle) and CLASSES in inputs:
            z = told_apart(z, inputs[CLASSES].to(z.device))
        return without_padding(z, inputs)

    def _called(self, args: Any, kwargs: Mapping[str, Any], weights: Weights) -> Any:
        """What the model returns at these weights."""
        return torch.func.functional_call(self.model, tuple(weights), args, dict(kwargs))

    def divided(self, inputs: Inputs, most: int | None) -> list[Inputs]:
        """``inputs`` in the parts that are evaluated at a time, of at most ``most``; None is all of them."""
        return split_inputs(inputs, most or count_inputs(inputs))

    def outputs(self, chunks: Iterable[Inputs], weights: Weights | None = None) -> Tensor:
        """The outputs ``z`` ``(N, m)`` of all ``chunks`` together, without a graph; None is the weights of now."""
        # A model that differentiates in its forward pass needs gradients enabled. No weight requires one here, so no
        # graph is left.
        with self.evaluation(), torch.enable_grad():
            weights = weights or self.weights()
            rows = []
            for chunk in chunks:
                z = self.mapped(chunk, weights)
                rows.append(flatten_outputs(z, count_inputs(chunk)).detach())
                self.row_shape = z.shape[1:]
            return torch.cat(rows)

    def shaped(self, inputs: Inputs) -> Tensor:
        """The outputs of now in the shape that they have in the output space, ``(N, ...)``, without a graph."""
        return self.outputs([inputs]).reshape(count_inputs(inputs), *self.row_shape)

    def first_outputs(self, chunks: Callable[[], Iterable[Inputs]]) -> Tensor:
        """The outputs at the weights of now, and on the way whether the model writes to its buffers.

        A model that keeps notes in its buffers starts every evaluation after this one from the notes that it has now.

        Args:
            chunks: Gives the inputs in parts, each time that it is called.
        """
        weights = self.weights()
        versions = [b._version for b in weights.buffers.values()]
        outputs = self.outputs(chunks(), weights)
        self._writes_buffers = versions != [b._version for b in weights.buffers.values()]
        return self.outputs(chunks()) if self._writes_buffers else outputs

    def padding_rows(self, inputs: Inputs) -> dict[str, list[int]]:
        """The padding rows of tables of embeddings, by the parameter's name: no lookup has a derivative by them.

        The first two of ``inputs`` are evaluated at the first call; the rows are the same for all inputs.
        """
        if self._padding_rows is None:
            weights, lookups = self.weights(), PureLookups()
            with self.evaluation(), torch.enable_grad():
                self.mapped(first_inputs(inputs, 2), weights, lookups)
            names = {id(p): name for name, p in weights.parameters.items()}
            rows: dict[str, set[int]] = {}
            for table, row in lookups.padding:
                if id(table) in names:
                    rows.setdefault(names[id(table)], set()).add(row)
            self._padding_rows = {name: sorted(found) for name, found in rows.items()}
        return self._padding_rows
