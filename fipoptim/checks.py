"""The optimizer's refusals: options out of range, and states that are not its own."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fipoptim.anchors.fingerprint import Fingerprint, same_reference
from fipoptim.shards import is_sharded, local, same_division
from fipoptim.state import no_velocity

# The options that a group carries in addition to its parameters.
OPTIONS = {"lr", "beta", "momentum", "keep_zeros", "seed", "reference"}
# The entries that every optimizer may keep for a parameter; a geometry may add its own.
ENTRIES = {"step", "exp_avg", "exp_avg_weight", "exp_avg_sq", "velocity", "within"}
_NUMBERS = {"step", "exp_avg_weight"}  # the entries that are one number
DEFAULT_LENGTH = 1e-2  # eps, and lr
_NOTHING_LOADED = "Nothing was loaded."


def check_number(name: str, value: Any, *, below: float = math.inf) -> float:
    """``value`` as a float.

    Raises:
        TypeError: If it is neither a number nor a tensor.
        ValueError: If it is not a single number, not finite, negative, or not less than ``below``.
    """
    if not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name}: must be a number, got {value!r}.")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name}: must be a single number, got a tensor of shape {tuple(value.shape)}."
        )
    number = float(value)
    if not (math.isfinite(number) and 0 <= number < below):
        limit = "finite and >= 0" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name}: must be {limit}, got {value!r}.")
    return number


def check_length(eps: Any, lr: Any) -> Any:
    """The length of a step, which may be given as ``eps`` or as ``lr``.

    Raises:
        TypeError: If it is neither a number nor a tensor.
        ValueError: If it is not a finite number from 0 on, or both are given and differ.
    """
    if lr is None:
        check_number("eps", eps)
        return eps
    check_number("lr", lr)
    if eps != DEFAULT_LENGTH and float(eps) != float(lr):
        raise ValueError(f"lr: is another name for eps; give one of them, got {lr!r} and {eps!r}.")
    return lr


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a ``value`` that is none of the ``choices``.

    Raises:
        ValueError: With the choices.
    """
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name}: choose {', '.join(others)} or {last}, got {value!r}.")


def check_type(name: str, value: Any, wanted: type, advice: str) -> None:
    """Refuse a ``value`` of another type.

    Raises:
        TypeError: With the advice.
    """
    if not isinstance(value, wanted):
        article = "an" if wanted.__name__[0] in "AEIOU" else "a"
        raise TypeError(
            f"{name}: must be {article} {wanted.__name__}, got {type(value).__name__}; {advice}."
        )


def refuse_grad_scaler(optimizer: Any) -> None:
    """Refuse a step by a GradScaler, which hands its scale over in attributes of the optimizer.

    Raises:
        RuntimeError: If one has.
    """
    handed = [optimizer.__dict__.pop(name, None) for name in ("grad_scale", "found_inf")]
    if any(value is not None for value in handed):
        raise RuntimeError(
            "GradScaler: FIPOptimizer cannot be stepped by one, as scaled gradients change beta. Use "
            "bfloat16 autocast, which needs no scaler, or GradScaler(enabled=False)."
        )


def refuse_weight_decay(value: Any) -> None:
    """Refuse a weight decay other than 0, for the optimizer or for one of its groups.

    Raises:
        ValueError: With what to use.
    """
    if value:
        raise ValueError(
            f"weight_decay: FIPOptimizer has none, got {value!r}: weights that shrink move the outputs that are to "
            "stay. Leave it out, or add its term to the loss, where beta weighs it: "
            "0.5 * weight_decay * sum(p.square().sum() for p in model.parameters())."
        )


def check_options(group: Mapping[str, Any]) -> None:
    """Check the options of a group, which schedulers and users may have changed.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.
    """
    if group["beta"] != "auto":
        check_number("beta", group["beta"])
    check_number("momentum", group["momentum"], below=1.0)
    if not isinstance(group["keep_zeros"], bool):
        raise TypeError(f"keep_zeros: must be True or False, got {group['keep_zeros']!r}.")
    check_number("lr", group["lr"])
    refuse_weight_decay(group.get("weight_decay"))
    matrix = group.get("matrix")
    if matrix is not None and not isinstance(matrix, bool):
        raise TypeError(f"matrix: must be True, False or None, got {matrix!r}.")
    if matrix and group["keep_zeros"]:
        raise ValueError(
            "matrix: a group with keep_zeros=True cannot be measured as matrices, got True; leave it out."
        )


def checked_state(
    state: Mapping[Any, dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    reference: Fingerprint,
    entries_of: Callable[[Tensor], Collection[str]],
) -> defaultdict[Tensor, dict[str, Any]]:
    """The state of each parameter that is being loaded, if it can be this optimizer's.

    Args:
        state: The entries of each parameter.
        groups: The groups that come with them.
        reference: The fingerprint of the anchors' reference of now.
        entries_of: The names of the entries that the geometry may keep for a parameter.

    Raises:
        ValueError: If the state cannot be this optimizer's.
    """
    for i, group in enumerate(groups):
        _check_group(i, group, reference)
    checked = {p: _checked_entries(p, entries, entries_of) for p, entries in state.items()}
    return defaultdict(dict, checked)


def _check_group(i: int, group: Mapping[str, Any], reference: Fingerprint) -> None:
    if missing := OPTIONS - group.keys():
        raise ValueError(
            f"state_dict: group {i} lacks {sorted(missing)}; it is not the state of a FIPOptimizer. "
            f"{_NOTHING_LOADED}"
        )
    try:
        check_options(group)
    except (TypeError, ValueError) as error:
        raise ValueError(f"state_dict: group {i}: {error} {_NOTHING_LOADED}") from error
    if not same_reference(group["reference"], reference):
        raise ValueError(
            "state_dict: was saved with other reference outputs than those that the anchors hold. Anchors that "
            "are built after the trained weights were restored take the resumed network for the reference. "
            "Save anchors.state_dict() beside the optimizer's and restore it first, by "
            "anchors.load_state_dict(...), or build the AnchorBatch on the network that is its reference "
            f"before its weights are replaced. {_NOTHING_LOADED}"
        )


def _checked_entries(
    p: Any, entries: dict[str, Any], entries_of: Callable[[Tensor], Collection[str]]
) -> dict[str, Any]:
    """The entries of one parameter, without the empty dictionaries that a flattened distributed checkpoint adds."""
    if not isinstance(p, Tensor):
        raise ValueError(
            f"state_dict: holds {p!r} beside the state of each parameter; it is not the state of a FIPOptimizer. "
            f"{_NOTHING_LOADED}"
        )
    entries = {
        name: value
        for name, value in entries.items()
        if not (isinstance(value, dict) and not value)
    }
    if unknown := entries.keys() - ENTRIES - set(entries_of(p)):
        raise ValueError(
            f"state_dict: holds {sorted(map(str, unknown))} of a parameter; it is not the state of a FIPOptimizer. "
            f"{_NOTHING_LOADED}"
        )
    for name, value in entries.items():
        _check_entry(p, name, value)
    velocity = entries.get("velocity")
    if velocity is not None and not bool(local(velocity).any()):
        entries["velocity"] = no_velocity(p)
    return entries


def _check_entry(p: Tensor, name: str, value: Any) -> None:
    single = name in _NUMBERS
    if isinstance(value, Tensor):
        fits = value.numel() == 1 if single else value.shape == p.shape
        if fits and not single and not same_division(p, value):
            raise ValueError(
                f"state_dict: {name!r} of a parameter is {_division(value)}, and the parameter is {_division(p)}. Load "
                "with torch.distributed.checkpoint.state_dict.set_state_dict, which divides a state anew. "
                f"{_NOTHING_LOADED}"
            )
        right = fits and bool(torch.isfinite(local(value)).all())
    else:
        right = single and isinstance(value, Real) and math.isfinite(value)
    if not right:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"state_dict: {name!r} of a parameter of shape {tuple(p.shape)} must be finite and "
            f"{'one number' if single else 'of that shape'}, got {got}. {_NOTHING_LOADED}"
        )


def _division(tensor: Tensor) -> str:
    return f"divided over {tensor.device_mesh}" if is_sharded(tensor) else "whole"
