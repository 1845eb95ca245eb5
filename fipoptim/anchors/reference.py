"""A reference that is not the model of now: another network, or its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fipoptim.anchors.inputs import Inputs
from fipoptim.anchors.network_function import NetworkFunction, Weights
from fipoptim.anchors.output_space import OutputMap, flatten_outputs
from fipoptim.anchors.refusals import check_outputs
from fipoptim.anchors.sample import SetAside


def reference_outputs(
    reference: Any,
    output: str | OutputMap,
    chunks: Callable[[], Iterable[Inputs]],
    model_outputs: Tensor,
) -> Tensor:
    """The outputs of a reference, in the precision and on the device of the model's.

    Args:
        reference: A network, or its outputs with one row an anchor.
        output: The output space of the anchors.
        chunks: Gives the anchors in parts, each time that it is called.
        model_outputs: The outputs of the model of now, shape ``(N, m)``.

    Raises:
        TypeError: If ``reference`` is neither a module nor a float tensor.
        ValueError: If its outputs are not finite, or of another shape than the model's.
    """
    check_reference(reference)
    if isinstance(reference, nn.Module):
        found = NetworkFunction(reference, output).first_outputs(chunks)
    else:
        if reference.dim() == 0 or len(reference) != len(model_outputs):
            raise ValueError(
                f"reference: must have one row for each of the {len(model_outputs)} anchors, got shape "
                f"{tuple(reference.shape)}."
            )
        found = flatten_outputs(reference.detach(), len(model_outputs)).clone()
    check_same_shape(found, model_outputs)
    return check_outputs(found.to(model_outputs))


def references_of(reference: Any, parts: SetAside) -> tuple[Any, Any]:
    """The references of the anchors and of the check inputs.

    Raises:
        ValueError: If it is outputs that say nothing of the check inputs.
    """
    if parts.check is None or not isinstance(reference, Tensor):
        return reference, reference
    if parts.rows is None or parts.check_rows is None:
        raise ValueError(
            "reference: outputs are of the anchors and say nothing of the check inputs. Give a network, or a share of "
            "the inputs as check."
        )
    if reference.dim() == 0 or len(reference) != len(parts.rows) + len(parts.check_rows):
        raise ValueError(
            f"reference: must have one row for each of the {len(parts.rows) + len(parts.check_rows)} inputs, got shape "
            f"{tuple(reference.shape)}."
        )
    rows, check_rows = (x.to(reference.device) for x in (parts.rows, parts.check_rows))
    return reference[rows], reference[check_rows]


def check_reference(reference: Any) -> None:
    """Refuse a reference that is neither a network nor a tensor of outputs.

    Raises:
        TypeError: With what came.
    """
    if not isinstance(reference, (nn.Module, Tensor)):
        raise TypeError(
            f"reference: must be a torch.nn.Module or a tensor of outputs, got {type(reference).__name__}."
        )


def check_same_shape(outputs: Tensor, model_outputs: Tensor) -> None:
    """Refuse outputs of a reference that do not have the shape of the model's.

    Raises:
        ValueError: With both shapes.
    """
    if outputs.shape != model_outputs.shape:
        raise ValueError(
            f"reference: has outputs of shape {tuple(outputs.shape)}, the model of {tuple(model_outputs.shape)}. "
            "Compare what both have, by output= a function that picks it."
        )


def reference_network(reference: Any, model: NetworkFunction) -> Weights:
    """A copy of the reference network, which gives the reference outputs of augmented anchors.

    Raises:
        TypeError: If ``reference`` is not a network.
        ValueError: If it is not of the model's architecture.
    """
    if not isinstance(reference, nn.Module):
        raise TypeError(
            "reference: with augment it must be a network, as outputs say nothing of augmented anchors."
        )
    network, own = NetworkFunction(reference, lambda z: z).snapshot(), model.weights()
    for part, wanted in zip(network, own, strict=True):
        if {k: t.shape for k, t in part.items()} != {k: t.shape for k, t in wanted.items()}:
            raise ValueError(
                f"reference: with augment it must be of the model's architecture, {type(model.model).__name__}, with "
                "the same names and shapes of parameters and buffers."
            )
    return Weights(
        *({k: t.to(own[i][k]) for k, t in part.items()} for i, part in enumerate(network))
    )
