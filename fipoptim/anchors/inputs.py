"""The forms that inputs take: a tensor, a tuple of tensors (positional) or a dict of tensors (keywords)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fipoptim.anchors.bundle import Bundle, call_form, without_classes
from fipoptim.anchors.refusals import check_no_nan

# A bundle is a dict, too.
Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
# What users give: one of the forms, or a list of batches.
GivenBatch = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
GivenInputs = GivenBatch | Sequence[GivenBatch]


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply ``function`` to every tensor of ``inputs``."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Bundle):
        return inputs.map(function)
    if isinstance(inputs, dict):
        return {name: function(x) for name, x in inputs.items()}
    return tuple(function(x) for x in inputs)


def named_tensors(inputs: Inputs, subject: str = "inputs") -> dict[str, Tensor]:
    """The tensors of ``inputs`` by the names that messages give them."""
    if isinstance(inputs, Tensor):
        return {subject: inputs}
    if isinstance(inputs, dict):
        return {f"{subject}[{name!r}]": x for name, x in inputs.items()}
    return {f"{subject}[{i}]": x for i, x in enumerate(inputs)}


def count_inputs(inputs: Inputs) -> int:
    """The number of anchors in ``inputs``."""
    return next(iter(named_tensors(inputs).values())).shape[0]


def first_inputs(inputs: Inputs, count: int) -> Inputs:
    """The first ``count`` anchors of ``inputs``, as views; all of them if there are fewer. Texts are trimmed."""
    return rows_of(inputs, slice(count))


def rows_of(inputs: Inputs, rows: slice) -> Inputs:
    """The anchors of ``inputs`` in ``rows``, as views. Texts are trimmed."""
    return trimmed(map_inputs(lambda x: x[rows], inputs))


def select_inputs(inputs: Inputs, index: Tensor) -> Inputs:
    """The anchors of ``inputs`` at ``index``, a tensor ``(k,)`` of whole numbers on any device. Texts are trimmed."""
    return trimmed(map_inputs(lambda x: x[index.to(x.device)], inputs))


def split_inputs(inputs: Inputs, size: int) -> list[Inputs]:
    """``inputs`` in parts of at most ``size`` anchors, which are views. Texts are trimmed to the longest of a part."""
    count = count_inputs(inputs)
    if size >= count:
        return [trimmed(inputs)]
    return [rows_of(inputs, slice(i, i + size)) for i in range(0, count, size)]


def split_equally(inputs: Inputs, parts: int) -> list[Inputs]:
    """Inputs in this many parts, at most as many as there are inputs, whose sizes differ by one at most."""
    count = count_inputs(inputs)
    return [
        rows_of(inputs, slice(k * count // parts, (k + 1) * count // parts)) for k in range(parts)
    ]


def trimmed(inputs: Inputs) -> Inputs:
    """Texts of different lengths without the positions that all of them pad; other inputs as they are."""
    return inputs.trimmed() if isinstance(inputs, Bundle) else inputs


def concatenate(parts: list[Inputs]) -> Inputs:
    """Inputs of the same form, joined along dimension 0."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(cast(list[Tensor], parts))
    if isinstance(first, dict):
        if isinstance(first, Bundle) and first.length is not None:
            bundles = cast(list[Bundle], parts)
            longest = max(part.positions for part in bundles)
            bundles = [part.padded(longest) for part in bundles]
            return first.like({n: torch.cat([part[n] for part in bundles]) for n in first})
        dicts = cast(list[dict[str, Tensor]], parts)
        together = {name: torch.cat([part[name] for part in dicts]) for name in first}
        return first.like(together) if isinstance(first, Bundle) else together
    return tuple(torch.cat(xs) for xs in zip(*cast(list[tuple[Tensor, ...]], parts), strict=True))


def copied_to(device: torch.device, inputs: Inputs) -> Inputs:
    """A copy of ``inputs`` on ``device``, each tensor in its own memory and in the layout that it has."""

    def copied(x: Tensor) -> Tensor:
        moved = x.to(device, non_blocking=True)
        return moved.clone() if moved is x else moved

    return map_inputs(copied, inputs)


def checked_form(inputs: Any, subject: str = "inputs") -> Inputs:
    """A detached copy of ``inputs`` in one of the three forms; a message begins with the ``subject``.

    Raises:
        TypeError: If ``inputs`` is not a tensor or a tuple or mapping of tensors.
        ValueError: If ``inputs`` is empty, if its tensors disagree on dimension 0, or if a float is not finite.
    """
    form: Inputs
    if isinstance(inputs, (Tensor, Bundle)):
        form = inputs
    elif isinstance(inputs, Mapping):
        form = dict(inputs)
    elif isinstance(inputs, tuple):
        form = inputs
    else:
        raise TypeError(
            f"{subject}: must be a tensor, a tuple of tensors or a dict of tensors with the anchors along "
            f"dimension 0, or a list of batches of these; got {type(inputs).__name__}."
        )
    tensors = named_tensors(form, subject)
    if not tensors:
        raise ValueError(
            f"{subject}: got an empty {type(inputs).__name__}; give at least one tensor."
        )
    sizes: dict[str, int] = {}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: must be a tensor, got {type(x).__name__}.")
        if x.dim() == 0 or x.shape[0] == 0:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, which holds no anchor; "
                "give at least one, along dimension 0."
            )
        check_no_nan(f"{name}:", x, "clean the anchors first")
        sizes[name] = x.shape[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{subject}: all tensors need the same number of anchors along dimension 0, got {sizes}."
        )
    return map_inputs(lambda x: x.detach().clone(), form)


def check_forms(name: str, inputs: Inputs, like: Inputs) -> None:
    """Refuse inputs that are not of the form of the anchors.

    Raises:
        TypeError: With both forms.
    """
    given, held = (named_tensors(without_classes(each)) for each in (inputs, like))
    if given.keys() != held.keys():
        raise TypeError(f"{name}: the anchors held are {sorted(held)}, got {sorted(given)}.")


def refuse_call(model: nn.Module, inputs: Inputs, error: TypeError) -> None:
    """Say what a model was called with, if it cannot be called with several inputs.

    Raises:
        TypeError: With the form of the inputs.
    """
    inputs = call_form(inputs)
    if isinstance(inputs, Tensor) or str(error).startswith(("model:", "reference:")):
        return
    given = f"{len(inputs)} positional inputs"
    if isinstance(inputs, dict):
        given = f"the keywords {sorted(inputs)}"
    raise TypeError(
        f"inputs: {type(model).__name__} cannot be called with {given} ({error}). "
        "Give what the model takes, and no labels."
    ) from error
