"""The outputs of a network and of its reference on the same inputs, to be compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fipoptim.anchors.inputs import Inputs, count_inputs, split_inputs
from fipoptim.anchors.network_function import NetworkFunction
from fipoptim.anchors.output_space import OutputMap, flatten_outputs
from fipoptim.anchors.refusals import check_outputs


def compared_outputs(
    model: nn.Module,
    reference: nn.Module | Tensor,
    inputs: Inputs,
    output: str | OutputMap,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The outputs of both in the output space, in the shape that they have there, on the model's device.

    Networks are evaluated as anchors are: in eval mode, without autocast.

    Args:
        model: The network.
        reference: The other network, or its outputs on ``inputs`` in the output space.
        inputs: The inputs.
        output: The output space.
        chunk_size: Inputs evaluated at a time.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``chunk_size`` is out of range, or outputs are not finite or of different shapes.
    """
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size: must be a positive integer, got {chunk_size!r}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(reference, (nn.Module, Tensor)):
        raise TypeError(
            f"reference: must be a torch.nn.Module or a tensor of outputs, got {type(reference).__name__}."
        )
    now = _outputs(model, output, inputs, chunk_size)
    if isinstance(reference, Tensor):
        before = check_outputs(reference.detach())
    else:
        before = _outputs(reference, output, inputs, chunk_size)
    if before.shape != now.shape:
        raise ValueError(
            f"reference: has outputs of shape {tuple(before.shape)}, the model of {tuple(now.shape)}. Compare what "
            "both have, by output= a function that picks it."
        )
    return now, before.to(now.device)


def _outputs(model: nn.Module, output: str | OutputMap, inputs: Inputs, chunk_size: int) -> Tensor:
    network = NetworkFunction(model, output)
    found = []
    with (
        network.evaluation(),
        torch.enable_grad(),
    ):  # for a model that differentiates in its forward pass
        weights = network.weights()
        for chunk in split_inputs(inputs, chunk_size):
            z = network.mapped(chunk, weights)
            rows = flatten_outputs(z, count_inputs(chunk)).detach()
            found.append(rows.reshape(z.shape))
    return check_outputs(torch.cat(found))
