"""The state of anchors: what a resumed run needs, written to a dictionary and checked when it is read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor

from fipoptim.anchors.inputs import Inputs, checked_inputs, count_inputs, first_inputs, map_inputs
from fipoptim.anchors.network_function import NetworkFunction, Weights
from fipoptim.anchors.refusals import check_no_nan
from fipoptim.anchors.route import Route

_SOURCE = "AnchorBatch.state_dict()"


@dataclass(frozen=True)
class AnchorState:
    """The part of its anchors that a resumed run needs.

    Attributes:
        inputs: The anchors.
        reference: Their reference outputs, shape ``(N, m)``.
        networks: With ``augment``, the networks that give the reference outputs of augmented anchors; else none.
        segments: The number of each anchor's network in ``networks``, shape ``(N,)``; 0 if there is none.
        seed: The seed of the draws.
        route: The record of which derivatives are traced.
        check: The state of the check inputs; None without any.
    """

    inputs: Inputs
    reference: Tensor
    networks: list[Weights]
    segments: Tensor
    seed: int
    route: Route
    check: AnchorState | None = None

    def to_dict(self) -> dict[str, Any]:
        """A copy in plain containers, which ``torch.load(weights_only=True)`` reads."""
        return {
            "inputs": map_inputs(torch.clone, self.inputs),
            "reference": self.reference.clone(),
            "references": [
                tuple({name: t.clone() for name, t in part.items()} for part in weights)
                for weights in self.networks
            ],
            "segments": self.segments.clone(),
            "seed": self.seed,
            "route": self.route.state_dict(),
            "check": None if self.check is None else self.check.to_dict(),
        }

    @classmethod
    def from_dict(
        cls,
        state: Any,
        function: NetworkFunction,
        *,
        like: Tensor,
        batch_size: int | None,
        augmented: bool,
        checked: bool = False,
    ) -> Self:
        """The state that :meth:`to_dict` wrote, copied and checked.

        Args:
            state: The result of :meth:`to_dict`, or anything else.
            function: The function of the anchors that load the state.
            like: A tensor of the precision and on the device that the reference outputs are to have.
            batch_size: How many anchors each step draws; None draws all.
            augmented: Whether the anchors are augmented.
            checked: Whether they have check inputs.

        Raises:
            ValueError: If ``state`` is of another form, belongs to another model or output space, or holds values that
                are not finite.
        """
        _check_keys(state)
        try:
            inputs = checked_inputs(state["inputs"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"state: 'inputs' is not what {_SOURCE} gives: {error}") from error
        count = count_inputs(inputs)
        if batch_size is not None and batch_size > count:
            raise ValueError(f"state: holds {count} anchors, fewer than batch_size={batch_size}.")
        reference = _checked_reference(state["reference"], inputs, function).to(like, copy=True)
        networks = _checked_networks(state["references"], function, augmented)
        segments = _checked_segments(state["segments"], count, max(1, len(networks)))
        seed = state["seed"]
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(
                f"state: 'seed' must be a whole number from 0 to 2^63 - 1, got {seed!r}."
            )
        if (state["check"] is not None) != checked:
            raise ValueError(
                "state: check was given for one of the two runs but not for the other."
            )
        check = None
        if checked:
            check = cls.from_dict(
                state["check"], function, like=like, batch_size=None, augmented=False
            )
        route = Route.of_state(state["route"])
        return cls(inputs, reference, networks, segments, seed, route, check)


_KEYS = {"inputs", "reference", "references", "segments", "seed", "route", "check"}


def _check_keys(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"state: must be what {_SOURCE} returned, got {type(state).__name__}.")
    if missing := _KEYS - state.keys():
        raise ValueError(f"state: lacks {sorted(missing)}; give what {_SOURCE} returned.")
    if unknown := state.keys() - _KEYS:
        raise ValueError(
            f"state: has unknown entries {sorted(map(str, unknown))}; give what {_SOURCE} returned."
        )


def _checked_reference(reference: Any, inputs: Inputs, function: NetworkFunction) -> Tensor:
    """The reference outputs, if ``function`` gives outputs of their width on ``inputs``."""
    count = count_inputs(inputs)
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
    try:
        width = function.outputs([first_inputs(inputs, 2)]).shape[1]
    except Exception as error:
        raise _other_model("its inputs do not fit", function, str(error)) from error
    if reference.shape[1] != width:
        raise ValueError(
            f"state: holds {reference.shape[1]} outputs an anchor, the model gives {width}; it belongs to another "
            "model or output space."
        )
    return cast(Tensor, reference)


def _checked_networks(networks: Any, function: NetworkFunction, augmented: bool) -> list[Weights]:
    """The reference networks, if they have the shapes of the model and are there exactly for augmented anchors."""
    if not isinstance(networks, list):
        raise ValueError(f"state: 'references' must be a list, got {type(networks).__name__}.")
    if bool(networks) != augmented:
        raise ValueError("state: augment was given for one of the two runs but not for the other.")
    return [_checked_network(network, i, function) for i, network in enumerate(networks)]


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
