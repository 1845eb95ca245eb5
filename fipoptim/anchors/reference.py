"""The first reference of anchors: the model of now, another network, or its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fipoptim.anchors.bundle import without_padding
from fipoptim.anchors.inputs import Inputs, count_inputs
from fipoptim.anchors.network_function import NetworkFunction, Weights
from fipoptim.anchors.networks import ReferenceNetwork, Snapshot, network_of, snapshot_of
from fipoptim.anchors.output_space import OutputMap, flatten_outputs
from fipoptim.anchors.references import References, segments_of
from fipoptim.anchors.refusals import check_outputs
from fipoptim.anchors.sample import SetAside
from fipoptim.anchors.sharded import network_function


def first_references(
    function: NetworkFunction,
    inputs: Inputs,
    chunks: Callable[[], Iterable[Inputs]],
    *,
    reference: Any,
    output: str | OutputMap,
    store: str | int,
    augmented: bool,
) -> References:
    """The reference on construction.

    Args:
        function: The model.
        inputs: The anchors.
        chunks: Gives the anchors in parts, each time that it is called.
        reference: As given to :class:`~fipoptim.AnchorBatch`, or a network of :mod:`fipoptim.anchors.networks`.
        output: The output space.
        store: How reference outputs are kept.
        augmented: Whether steps see augmented anchors.

    Raises:
        TypeError: If ``reference`` is of another type.
        ValueError: If outputs are not finite or of another shape than the model's, if the reference is a module that
            moves with the model, or if ``augmented`` takes another reference.
    """
    segments = segments_of(count_inputs(inputs))
    if store == "live":
        like = function.first_outputs(lambda: list(chunks())[:1])[:0]
        network = (
            snapshot_of(function) if reference is None else network_of(reference, function, output)
        )
        for chunk in chunks():
            found = network.outputs([chunk])
            check_same_shape(found[:0], like)
            check_outputs(found)
            del found
        return References(None, like, [network], segments)
    outputs = check_outputs(function.first_outputs(chunks))
    networks: list[ReferenceNetwork] = []
    if augmented:
        networks = [_network_of_augmented(reference, function, output)]
    if reference is not None:
        outputs = reference_outputs(reference, function, output, inputs, chunks, outputs)
    return References(in_store(outputs, store), outputs[:0].clone(), networks, segments)


def in_store(outputs: Tensor, store: str | int) -> Tensor:
    """Outputs in the precision in which they are kept.

    Raises:
        ValueError: If half precision does not hold them.
    """
    if store != "half":
        return outputs
    kept = outputs.half()
    if not bool(kept.isfinite().all()):
        raise ValueError(
            f"store: 'half' holds numbers up to 65504, but a reference output is {float(outputs.abs().max()):.6g}. "
            "Give store='full' or 'live', or another output space."
        )
    return kept


def _network_of_augmented(
    reference: Any, function: NetworkFunction, output: str | OutputMap
) -> ReferenceNetwork:
    """The network that gives the reference outputs of augmented anchors."""
    if reference is None:
        return snapshot_of(function)
    if callable(reference) and not isinstance(reference, nn.Module):
        return network_of(reference, function, output)
    return Snapshot(function, reference_network(reference, function))


def reference_outputs(
    reference: Any,
    function: NetworkFunction,
    output: str | OutputMap,
    inputs: Inputs,
    chunks: Callable[[], Iterable[Inputs]],
    model_outputs: Tensor,
) -> Tensor:
    """The outputs of a reference, in the precision and on the device of the model's.

    Args:
        reference: A network, or its outputs with one row an anchor.
        function: The model.
        output: The output space of the anchors.
        inputs: The anchors.
        chunks: Gives the anchors in parts, each time that it is called.
        model_outputs: The outputs of the model of now, shape ``(N, m)``.

    Raises:
        TypeError: If ``reference`` is neither a module nor a float tensor.
        ValueError: If its outputs are not finite, or of another shape than the model's.
    """
    if isinstance(reference, nn.Module):
        found = network_function(reference, output).first_outputs(chunks)
    elif callable(reference) and not isinstance(reference, Tensor):
        found = network_of(reference, function, output).outputs(chunks())
    else:
        check_reference(reference)
        given = without_padding(reference.detach(), inputs)
        found = flatten_outputs(given, len(model_outputs)).clone()
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


def check_rows(reference: Tensor, count: int) -> None:
    """Refuse reference outputs without one row for each of ``count`` anchors.

    Raises:
        ValueError: With their shape.
    """
    if reference.dim() == 0 or len(reference) != count:
        raise ValueError(
            f"reference: must have one row for each of the {count} anchors, got shape {tuple(reference.shape)}."
        )


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
    network, own = network_function(reference, lambda z: z).snapshot(), model.weights()
    for part, wanted in zip(network, own, strict=True):
        if {k: t.shape for k, t in part.items()} != {k: t.shape for k, t in wanted.items()}:
            raise ValueError(
                f"reference: with augment it must be of the model's architecture, {type(model.model).__name__}, with "
                "the same names and shapes of parameters and buffers."
            )
    return Weights(
        *({k: t.to(own[i][k]) for k, t in part.items()} for i, part in enumerate(network))
    )
