"""The anchors of one step, and the inputs that are set aside from all steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fipoptim.anchors.batches import checked_inputs
from fipoptim.anchors.bundle import Bundle, call_form, without_classes
from fipoptim.anchors.draws import seed_of_step
from fipoptim.anchors.inputs import Inputs, concatenate, count_inputs, select_inputs


class Sample(NamedTuple):
    """The anchors of one step: their inputs and the outputs ``(N, m)`` they had at the reference."""

    inputs: Inputs
    reference: Tensor


def drawn(count: int, size: int | None, seed: int) -> Tensor:
    """The numbers of ``size`` of ``count`` anchors, drawn without replacement; None is all of them, in order."""
    if size is None:
        return torch.arange(count, device="cpu")
    seeded = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(count, generator=seeded, device="cpu")[:size]


def augmented(augment: Callable[[Any], Any], inputs: Inputs) -> Inputs:
    """What ``augment`` makes of some anchors, in one of the forms of inputs. A list of tensors is taken as a tuple.

    Raises:
        TypeError: If it is of no such form.
        ValueError: If texts of different lengths become longer than the longest.
    """
    given, inputs = augment(call_form(inputs)), without_classes(inputs)
    found = checked_inputs(tuple(given) if isinstance(given, list) else given, "augment")
    if not isinstance(inputs, Bundle) or not isinstance(found, dict) or inputs.length is None:
        return found
    bundle = inputs.like(found)
    if bundle.positions > inputs.length:
        raise ValueError(
            f"augment: made texts of {bundle.positions} positions, but the longest anchor has {inputs.length}."
        )
    return bundle


def by_segment(segments: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each number in ``segments`` ``(n,)``, in ascending order, with the rows that have it."""
    for number in segments.unique().tolist():
        yield number, (segments == number).nonzero().squeeze(1)


def augmented_apart(
    augment: Callable[[Any], Any], inputs: Inputs, segments: Tensor
) -> tuple[Inputs, Tensor]:
    """What ``augment`` makes of anchors: those of different reference networks are augmented apart.

    Args:
        augment: The augmentation.
        inputs: The anchors.
        segments: The number of each anchor's reference network, shape ``(n,)``.

    Returns:
        The augmented anchors, in the order of their networks, and the number of each one's network.
    """
    parts, numbers = [], []
    for number, rows in by_segment(segments):
        parts.append(augmented(augment, select_inputs(inputs, rows)))
        numbers.append(segments.new_full((count_inputs(parts[-1]),), number))
    return concatenate(parts), torch.cat(numbers)


class SetAside(NamedTuple):
    """Inputs in two parts, with the rows that each part has in what was given; None if they are not of it.

    Attributes:
        inputs: The anchors.
        rows: Their rows.
        check: The inputs on which budgets count; None if there are none.
        check_rows: Their rows.
    """

    inputs: Inputs
    rows: Tensor | None
    check: Inputs | None
    check_rows: Tensor | None


def set_aside(inputs: Inputs, check: Any, seed: int) -> SetAside:
    """The anchors and the check inputs that ``check`` asks for: further inputs, or a share of ``inputs``.

    Raises:
        TypeError: If ``check`` is none of these.
        ValueError: If the share is not in (0, 1), or leaves one part empty.
    """
    if check is None:
        return SetAside(inputs, None, None, None)
    if isinstance(check, bool) or not isinstance(check, Real):
        return SetAside(inputs, None, checked_inputs(check, "check"), None)
    count, share = count_inputs(inputs), float(check)
    if not 0 < share < 1:
        raise ValueError(f"check: a share of the inputs must be in (0, 1), got {check!r}.")
    aside = round(share * count)
    if not 0 < aside < count:
        raise ValueError(
            f"check: a share of {check!r} of {count} inputs is {aside}, but both parts must have inputs. Give more "
            "inputs or another share."
        )
    seeded = torch.Generator("cpu").manual_seed(seed_of_step(seed, -1))
    order = torch.randperm(count, generator=seeded, device="cpu")
    check_rows, rows = order[:aside].sort().values, order[aside:].sort().values
    return SetAside(
        select_inputs(inputs, rows), rows, select_inputs(inputs, check_rows), check_rows
    )
