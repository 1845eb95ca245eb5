"""The outputs of a network and of its reference on the same inputs, to be compared."""

from __future__ import annotations

from torch import Tensor, nn

from fipoptim.anchors.inputs import Inputs, split_inputs
from fipoptim.anchors.output_space import OutputMap
from fipoptim.anchors.reference import check_reference, check_same_shape
from fipoptim.anchors.refusals import check_outputs, check_positive
from fipoptim.anchors.sharded import network_function


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
    check_positive("chunk_size", chunk_size)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module, got {type(model).__name__}.")
    check_reference(reference)
    now = _outputs(model, output, inputs, chunk_size)
    if isinstance(reference, Tensor):
        before = check_outputs(reference.detach())
    else:
        before = _outputs(reference, output, inputs, chunk_size)
    check_same_shape(before, now)
    return now, before.to(now.device)


def _outputs(model: nn.Module, output: str | OutputMap, inputs: Inputs, chunk_size: int) -> Tensor:
    network = network_function(model, output)
    found = check_outputs(network.outputs(split_inputs(inputs, chunk_size)))
    return found.reshape(-1, *network.row_shape)
