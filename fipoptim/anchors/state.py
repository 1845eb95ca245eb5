"""The state of anchors: what a resumed run needs, written to a dictionary and checked when it is read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor

from fipoptim.anchors.batches import checked_inputs
from fipoptim.anchors.bundle import Bundle, count_positions
from fipoptim.anchors.fingerprint import Fingerprint, same_reference
from fipoptim.anchors.inputs import Inputs, count_inputs, first_inputs, map_inputs
from fipoptim.anchors.network_function import NetworkFunction, Weights
from fipoptim.anchors.networks import ReferenceNetwork, Snapshot
from fipoptim.anchors.references import References
from fipoptim.anchors.refusals import check_no_nan
from fipoptim.anchors.route import Route

_SOURCE = "AnchorBatch.state_dict()"


@dataclass(frozen=True)
class AnchorState:
    """The part of its anchors that a resumed run needs.

    Attributes:
        inputs: The anchors.
        references: Their reference.
        seed: The seed of the draws.
        route: The record of which derivatives are traced.
        check: The state of the check inputs; None without any.
    """

    inputs: Inputs
    references: References
    seed: int
    route: Route
    check: AnchorState | None = None

    def to_dict(self, within: AnchorState | None = None) -> dict[str, Any]:
        """A copy in plain containers, which ``torch.load(weights_only=True)`` reads.

        Args:
            within: The state of which this is the check; networks that both share are written once.
        """
        outputs, networks = self.references.outputs, self.references.networks
        shared = [] if within is None else within.references.networks
        return {
            "inputs": _plain(self.inputs),
            "texts": _texts(self.inputs),
            "reference": None if outputs is None else outputs.clone(),
            "references": [_written(network, shared) for network in networks],
            "segments": self.references.segments.clone(),
            "fingerprint": self._fingerprint(),
            "seed": self.seed,
            "route": self.route.state_dict(),
            "check": None if self.check is None else self.check.to_dict(self),
        }

    def _fingerprint(self) -> Fingerprint | None:
        """The fingerprint of a reference of which no outputs are kept; else None."""
        if self.references.outputs is not None:
            return None
        return self.references.fingerprint(self.inputs, lambda x: [x])

    @classmethod
    def from_dict(
        cls,
        state: Any,
        function: NetworkFunction,
        *,
        like: References,
        batch_size: int | None,
        networks: bool,
        checked: bool = False,
        within: list[ReferenceNetwork] | None = None,
    ) -> Self:
        """The state that :meth:`to_dict` wrote, copied and checked.

        Args:
            state: The result of :meth:`to_dict`, or anything else.
            function: The function of the anchors that load the state.
            like: The reference of these anchors, which says how the one that is read is kept.
            batch_size: How many anchors each step draws; None draws all.
            networks: Whether networks give reference outputs, of augmented anchors or of all.
            checked: Whether the anchors have check inputs.
            within: The networks of the anchors of which this is the check.

        Raises:
            ValueError: If ``state`` is of another form, belongs to another model or output space, or holds values that
                are not finite.
        """
        _check_keys(state)
        inputs = _checked_inputs(state["inputs"], state["texts"])
        count = count_inputs(inputs)
        if batch_size is not None and batch_size > count:
            raise ValueError(f"state: holds {count} anchors, fewer than batch_size={batch_size}.")
        reference = _checked_reference(state["reference"], inputs, function, like)
        found = _checked_networks(state["references"], function, networks, like, within or [])
        segments = _checked_segments(state["segments"], count, max(1, len(found)))
        seed = state["seed"]
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(
                f"state: 'seed' must be a whole number from 0 to 2^63 - 1, got {seed!r}."
            )
        references = _references(reference, inputs, function, like, found, segments)
        if references.outputs is None:
            _check_fingerprint(state["fingerprint"], references, inputs)
        if (state["check"] is not None) != checked:
            raise ValueError(
                "state: check was given for one of the two runs but not for the other."
            )
        check = None
        if checked:
            check = cls.from_dict(
                state["check"],
                function,
                like=like,
                batch_size=None,
                networks=references.outputs is None,
                within=found,
            )
        route = Route.of_state(state["route"])
        return cls(inputs, references, seed, route, check)


_KEYS = {
    *("inputs", "texts", "reference", "references", "segments", "fingerprint"),
    *("seed", "route", "check"),
}


def _plain(inputs: Inputs) -> Inputs:
    """A copy of inputs in plain containers."""
    copy = map_inputs(torch.clone, inputs)
    return dict(copy) if isinstance(copy, Bundle) else copy


def _texts(inputs: Inputs) -> dict[str, Any] | None:
    """How the outputs of texts of different lengths are read; None for other inputs."""
    if not isinstance(inputs, Bundle):
        return None
    return {
        "length": inputs.length,
        "along": sorted(inputs.along),
        "positional": bool(inputs.positional),
    }


def _checked_inputs(inputs: Any, texts: Any) -> Inputs:
    try:
        found = checked_inputs(inputs)
        if texts is None:
            return found
        if not isinstance(found, dict) or not set(texts["along"]) <= found.keys():
            raise ValueError("they are no texts.")
        bundle = Bundle(found, **texts)
        if not isinstance(bundle.length, int) or bundle.length < bundle.positions:
            raise ValueError(f"{bundle.positions} positions are more than {bundle.length!r}.")
        return bundle
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"state: 'inputs' is not what {_SOURCE} gives: {error}") from error


def _written(network: ReferenceNetwork, shared: list[ReferenceNetwork]) -> Any:
    """A network in plain containers: its weights, the number of one that is shared, or None for one that was given."""
    for number, other in enumerate(shared):
        if other is network:
            return number
    if not isinstance(network, Snapshot):
        return None
    return tuple({name: t.clone() for name, t in part.items()} for part in network.weights)


def _references(
    outputs: Tensor | None,
    inputs: Inputs,
    function: NetworkFunction,
    like: References,
    networks: list[ReferenceNetwork],
    segments: Tensor,
) -> References:
    """The reference that was read, with outputs of the width that these inputs have."""
    width = like.width
    if outputs is not None:
        width = outputs.shape[1]
    elif count_positions(inputs) is not None:
        width = _width(inputs, function)
    return References(outputs, like.like.new_empty(0, width), networks, segments)


def _check_fingerprint(saved: Any, references: References, inputs: Inputs) -> None:
    if not isinstance(saved, (tuple, list)) or not all(isinstance(x, float) for x in saved):
        raise ValueError(f"state: 'fingerprint' is not what {_SOURCE} gives: {saved!r}.")
    if not same_reference(saved, references.fingerprint(inputs, lambda x: [x])):
        raise ValueError(
            "state: was saved with another reference network. Build the anchors with the same reference= as in the run "
            "that is resumed."
        )


def _check_keys(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"state: must be what {_SOURCE} returned, got {type(state).__name__}.")
    if missing := _KEYS - state.keys():
        raise ValueError(f"state: lacks {sorted(missing)}; give what {_SOURCE} returned.")
    if unknown := state.keys() - _KEYS:
        raise ValueError(
            f"state: has unknown entries {sorted(map(str, unknown))}; give what {_SOURCE} returned."
        )


def _checked_reference(
    reference: Any, inputs: Inputs, function: NetworkFunction, like: References
) -> Tensor | None:
    """The reference outputs, if ``function`` gives outputs of their width on ``inputs``."""
    count = count_inputs(inputs)
    if (reference is None) != (like.outputs is None):
        raise ValueError(
            "state: store='live' was given for one of the two runs but not for the other."
        )
    if like.outputs is None:
        return None
    fits = (
        isinstance(reference, Tensor)
        and reference.is_floating_point()
        and reference.dim() == 2
        and reference.shape[0] == count
    )
    if not fits:
        got = reference
        if isinstance(reference, Tensor):
            got = f"{tuple(reference.shape)} of {reference.dtype}"
        raise ValueError(
            f"state: 'reference' must be a float tensor with a row for each of the {count} anchors, got {got}."
        )
    check_no_nan("state: 'reference'", reference)
    width = _width(inputs, function)
    if reference.shape[1] != width:
        raise ValueError(
            f"state: holds {reference.shape[1]} outputs an anchor, the model gives {width}; it belongs to another "
            "model or output space."
        )
    return cast(Tensor, reference).to(like.outputs, copy=True)


def _width(inputs: Inputs, function: NetworkFunction) -> int:
    """The number of outputs that the model gives for each of ``inputs``."""
    try:
        return function.outputs([first_inputs(inputs, 2)]).shape[1]
    except Exception as error:
        raise _other_model("its inputs do not fit", function, str(error)) from error


def _checked_networks(
    networks: Any,
    function: NetworkFunction,
    wanted: bool,
    like: References,
    within: list[ReferenceNetwork],
) -> list[ReferenceNetwork]:
    """The reference networks, if they have the shapes of the model and are there exactly where they are wanted."""
    if not isinstance(networks, list):
        raise ValueError(f"state: 'references' must be a list, got {type(networks).__name__}.")
    if bool(networks) != wanted:
        raise ValueError("state: augment was given for one of the two runs but not for the other.")
    found: list[ReferenceNetwork] = []
    for i, network in enumerate(networks):
        if type(network) is int and 0 <= network < len(within):
            found.append(within[network])
        elif network is None:
            found.append(_given_network(like))
        else:
            found.append(Snapshot(function, _checked_network(network, i, function)))
    return found


def _given_network(like: References) -> ReferenceNetwork:
    """The network that was given as reference, which is not part of a state."""
    for network in like.networks:
        if not isinstance(network, Snapshot):
            return network
    raise ValueError(
        "state: its reference is a network that was given and not copied; build the anchors with the same reference= "
        "as in the run that is resumed."
    )


def _checked_network(network: Any, number: int, function: NetworkFunction) -> Weights:
    if not isinstance(network, (tuple, list)) or len(network) != 2:
        raise ValueError(
            f"state: reference network {number} is not a pair of parameters and buffers."
        )
    parts = []
    for kind, part, own in zip(("parameters", "buffers"), network, function.weights(), strict=True):
        shapes = {name: getattr(t, "shape", None) for name, t in part.items()}
        if shapes != {name: t.shape for name, t in own.items()}:
            raise _other_model(
                f"the {kind} of reference network {number} are not those of", function
            )
        for name, t in part.items():
            check_no_nan(f"state: {name!r} of reference network {number}", t)
        parts.append({name: t.to(own[name], copy=True) for name, t in part.items()})
    return Weights(*parts)


def _checked_segments(segments: Any, count: int, networks: int) -> Tensor:
    """The network of each anchor, on the CPU, if each is one of the ``networks``."""
    if not (
        isinstance(segments, Tensor)
        and segments.dtype == torch.long
        and segments.shape == (count,)
        and bool(((segments >= 0) & (segments < networks)).all())
    ):
        raise ValueError(
            f"state: 'segments' must number one of {networks} reference networks for each of the {count} anchors, "
            f"got {segments!r}."
        )
    return segments.cpu().clone()


def _other_model(what: str, function: NetworkFunction, why: str = "") -> ValueError:
    return ValueError(
        f"state: {what} the model, {type(function.model).__name__}{f' ({why})' if why else ''}; it belongs to another "
        "model."
    )
