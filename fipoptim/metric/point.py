"""One point of weight space, and the network as a function of some of its parameters there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fipoptim.anchors.inputs import Inputs
from fipoptim.anchors.network_function import NetworkFunction, Weights

Parameters = dict[str, Tensor]
Function = Callable[[Parameters], Tensor]


@dataclass(frozen=True)
class Point:
    """A network's weights, and the parameters among them by which its outputs are differentiated.

    Attributes:
        network: The network.
        weights: All of its weights.
        names: The names of the parameters to differentiate by, without aliases of tied parameters.
    """

    network: NetworkFunction
    weights: Weights
    names: Sequence[str]

    @property
    def parameters(self) -> Parameters:
        """The parameters to differentiate by."""
        return {name: self.weights.parameters[name] for name in self.names}

    @property
    def others(self) -> Weights:
        """The parameters that are not differentiated by, and the buffers."""
        parameters, buffers = self.weights
        named = set(self.names)
        return Weights({k: p for k, p in parameters.items() if k not in named}, buffers)

    @property
    def convolutional(self) -> bool:
        """Whether a parameter of the network has more than two dimensions, as the weights of convolutions have."""
        return any(p.dim() > 2 for p in self.weights.parameters.values())

    def function_on(self, inputs: Inputs) -> Function:
        """The outputs ``z`` ``(N, m)`` of ``inputs`` as a function of the parameters to differentiate by."""
        return functools.partial(self._outputs_at, inputs)

    def outputs(self, inputs: Inputs, parameters: Parameters | None = None) -> Tensor:
        """The outputs ``z`` ``(N, m)`` of ``inputs`` without a graph, inside the network's evaluation.

        Args:
            inputs: The anchors.
            parameters: The parameters to differentiate by, if they are others than those at this point.
        """
        with torch.enable_grad():  # for a model that differentiates in its forward pass
            return self._outputs_at(inputs, parameters or {}).detach()

    def _outputs_at(self, inputs: Inputs, parameters: Parameters) -> Tensor:
        weights = self.weights
        return self.network.call(inputs, Weights(weights.parameters | parameters, weights.buffers))
