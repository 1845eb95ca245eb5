"""Networks that give reference outputs: a copy of the model's weights, another module, or the model in a context."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fipoptim.anchors.evaluation import unwrap
from fipoptim.anchors.inputs import Inputs, count_inputs
from fipoptim.anchors.network_function import NetworkFunction, Weights
from fipoptim.anchors.output_space import OutputMap
from fipoptim.anchors.sharded import network_function
from fipoptim.shards import named_parameters

Context = Callable[[], AbstractContextManager[Any]]


class ReferenceNetwork(Protocol):
    """A network whose outputs are the reference."""

    @property
    def function(self) -> NetworkFunction:
        """The function of the module that is evaluated."""

    def outputs(self, chunks: Iterable[Inputs]) -> Tensor:
        """The outputs ``z`` ``(N, m)`` of all ``chunks`` together, without a graph."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The model with a copy of its weights.

    Attributes:
        function: The model.
        weights: The copy.
    """

    function: NetworkFunction
    weights: Weights

    def outputs(self, chunks: Iterable[Inputs]) -> Tensor:
        """See :class:`ReferenceNetwork`."""
        return self.function.outputs(chunks, self.weights)


@dataclass(frozen=True, eq=False)
class OtherModule:
    """Another module, of which nothing is copied.

    Attributes:
        function: That module.
    """

    function: NetworkFunction

    def outputs(self, chunks: Iterable[Inputs]) -> Tensor:
        """See :class:`ReferenceNetwork`."""
        return self.function.outputs(chunks)


@dataclass(frozen=True, eq=False)
class WithinContext:
    """The model itself inside a context, such as that in which its adapters are off; nothing is copied.

    Attributes:
        function: The model.
        context: Gives the context.
    """

    function: NetworkFunction
    context: Context

    def outputs(self, chunks: Iterable[Inputs]) -> Tensor:
        """See :class:`ReferenceNetwork`."""
        # PEFT lets adapters require a gradient when they are on again, also those that did not.
        params = named_parameters(self.function.model).values()
        required = [(p, p.requires_grad) for p in params]
        try:
            with self.context():
                return self.function.outputs(chunks)
        finally:
            for p, requires in required:
                if p.requires_grad != requires:
                    p.requires_grad_(requires)


NETWORKS = (Snapshot, OtherModule, WithinContext)


def network_of(
    reference: Any, function: NetworkFunction, output: str | OutputMap
) -> ReferenceNetwork:
    """The network that ``reference`` stands for, without a copy of it.

    Args:
        reference: A module, a callable that returns a context manager, or one of these networks.
        function: The anchors' own model.
        output: The output space.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is a module that moves with the model.
    """
    if isinstance(reference, NETWORKS):
        return reference
    if isinstance(reference, nn.Module):
        _check_apart(reference, function.model)
        return OtherModule(network_function(reference, output))
    if not callable(reference):
        raise TypeError(
            "reference: with store='live' it must be a torch.nn.Module or a callable that returns a context manager, "
            f"got {type(reference).__name__}. Outputs are kept by store='full'."
        )
    context = reference()
    if not (hasattr(context, "__enter__") and hasattr(context, "__exit__")):
        raise TypeError(
            "reference: a callable must return a context manager in which the model is the reference, such as "
            f"peft_model.disable_adapter; it returned {type(context).__name__}."
        )
    return WithinContext(function, reference)


def _check_apart(reference: nn.Module, model: nn.Module) -> None:
    """Refuse a reference that is, or shares a trained parameter with, the model.

    Raises:
        ValueError: With what to give.
    """
    advice = (
        "Give copy.deepcopy of it, None to keep a copy of its weights, or a callable that returns a context in which "
        "the model is the reference, such as peft_model.disable_adapter."
    )
    if unwrap(reference) is model:
        raise ValueError(f"reference: is the model itself, which will move. {advice}")
    own = {id(p) for p in named_parameters(model).values() if p.requires_grad}
    shared = [name for name, p in named_parameters(reference).items() if id(p) in own]
    if shared:
        raise ValueError(
            f"reference: shares {shared[0]!r} and {len(shared) - 1} more parameters with the model, which require a "
            f"gradient and will move. {advice}"
        )


@torch.inference_mode(False)
def snapshot_of(function: NetworkFunction) -> Snapshot:
    """The model of now, with a copy of its weights."""
    return Snapshot(function, function.snapshot())


def likely_classes(
    inputs: Inputs, network: ReferenceNetwork, k: int, split: Callable[[Inputs], Iterable[Inputs]]
) -> Tensor:
    """The k likeliest classes at each position of inputs, by a network; shape ``(N, ..., k)``.

    Args:
        inputs: The inputs, without classes.
        network: The network.
        k: The number of classes.
        split: Divides inputs into parts, which are evaluated at a time.

    Raises:
        ValueError: If there are no more classes than that.
    """
    found = []
    for chunk in split(inputs):
        z = network.outputs([chunk]).reshape(count_inputs(chunk), *network.function.row_shape)
        if z.shape[-1] <= k:
            raise ValueError(
                f"store: {k} classes cannot be told apart from others, as there are {z.shape[-1]}; give store='full'."
            )
        found.append(z.topk(k, dim=-1).indices.int())
        del z
    return torch.cat(found)
