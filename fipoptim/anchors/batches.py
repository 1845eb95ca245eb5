"""Lists of batches, such as texts of different lengths, joined into one set of inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from fipoptim.anchors.bundle import MASK, Bundle, count_positions
from fipoptim.anchors.inputs import (
    Inputs,
    checked_form,
    concatenate,
    count_inputs,
    first_inputs,
    named_tensors,
)
from fipoptim.anchors.texts import LABELS, check_texts


def checked_inputs(inputs: Any, subject: str = "inputs") -> Inputs:
    """A detached copy of ``inputs`` in one of the three forms; a message begins with the ``subject``.

    A list is one of batches, which are joined. Texts of different lengths become a :class:`Bundle`.

    Raises:
        TypeError: If ``inputs`` is not a tensor, a tuple or mapping of tensors, or a list of batches of one form.
        ValueError: If ``inputs`` is empty, if its tensors disagree on dimension 0, if a float is not finite, if it has
            labels, if an attention mask does not fit, or if batches of different shapes have no attention mask.
    """
    if not isinstance(inputs, list):
        checked = checked_form(inputs, subject)
        check_texts(checked, subject)
        return checked
    if not inputs:
        raise ValueError(f"{subject}: got an empty list; give at least one batch.")
    parts: list[Inputs] = []
    for i, batch in enumerate(inputs):
        if not isinstance(batch, (Tensor, tuple, Mapping)):
            raise TypeError(
                f"{subject}[{i}]: must be a tensor, got {type(batch).__name__}; a list is one of batches, each a "
                "tensor, a tuple or a dict of tensors. Give positional inputs as a tuple."
            )
        parts.append(checked_inputs(batch, f"{subject}[{i}]"))
    return joined(parts, subject)


def joined(parts: Sequence[Inputs], subject: str = "inputs") -> Inputs:
    """Checked inputs of one form, joined along dimension 0; texts are padded to the longest.

    Raises:
        TypeError: If they are of different forms.
        ValueError: If they have different shapes and no attention mask.
    """
    first = parts[0]
    for i, part in enumerate(parts):
        if named_tensors(part).keys() != named_tensors(first).keys():
            raise TypeError(
                f"{subject}[{i}]: all batches must be of one form; the first has {sorted(named_tensors(first))}, this "
                f"one {sorted(named_tensors(part))}."
            )
    bundled = any(isinstance(part, Bundle) for part in parts)
    if bundled or not _have_one_shape(parts):
        return concatenate(list(_bundles(parts, subject)))
    return concatenate(list(parts))


def _have_one_shape(parts: Sequence[Inputs]) -> bool:
    shapes = [[x.shape[1:] for x in named_tensors(part).values()] for part in parts]
    return all(each == shapes[0] for each in shapes)


def _bundles(parts: Sequence[Inputs], subject: str) -> Iterable[Inputs]:
    """Batches of texts as bundles of one length."""
    lengths = [count_positions(part) for part in parts]
    for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        if length is None:
            first, shapes = _shapes(parts[0]), _shapes(part)
            raise ValueError(
                f"{subject}: batches of different shapes are joined only if each is a dict with an {MASK!r} of shape "
                f"(N, T), which says where a text ends; batch 0 has {first}, batch {i} has {shapes}. Have the "
                "tokenizer return the mask, or pad the inputs to one shape. Give positional inputs as a tuple."
            )
    dicts = cast(list[dict[str, Tensor]], list(parts))
    along = {
        name
        for name in dicts[0]
        if all(
            name in part.along if isinstance(part, Bundle) else _is_along(part[name], part)
            for part in dicts
        )
    }
    for name in dicts[0].keys() - along:
        if len({part[name].shape[1:] for part in dicts}) > 1:
            raise ValueError(
                f"{subject}: {name!r} has another shape in another batch, {[tuple(p[name].shape) for p in dicts]}, and "
                f"not the positions of the {MASK!r} along dimension 1. Pad it to one shape."
            )
    longest = max(length for length in lengths if length is not None)
    known = [part.positional for part in dicts if isinstance(part, Bundle)]
    positional = next((each for each in known if each is not None), None)
    for part in dicts:
        yield Bundle(part, length=longest, along=along, positional=positional)


def _is_along(x: Tensor, part: Mapping[str, Tensor]) -> bool:
    return x.dim() > 1 and x.shape[1] == part[MASK].shape[1]


def _shapes(inputs: Inputs) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in named_tensors(inputs).items()}


def inputs_from_loader(loader: Iterable[Any], count: int) -> Inputs:
    """The first ``count`` inputs that ``loader`` yields, batch by batch.

    A batch that is a tuple or a list is read at position 0; a mapping is taken whole, without ``labels`` and ``label``.
    Batches of texts may have different lengths, if they have an attention mask.

    Raises:
        ValueError: If ``count`` is not positive, the loader yields fewer inputs, or batches do not fit together.
    """
    if count < 1:
        raise ValueError(f"n: must be a positive number of anchors, got {count!r}.")
    parts: list[Inputs] = []
    found = 0
    for batch in loader:
        x = batch
        if isinstance(batch, (tuple, list)):
            # A loader makes lists of tuples.
            x = tuple(batch[0]) if isinstance(batch[0], list) else batch[0]
        elif isinstance(batch, Mapping):
            x = {name: t for name, t in batch.items() if name not in LABELS}
        part = checked_inputs(x, f"loader: batch {len(parts)}")
        parts.append(first_inputs(part, count - found))
        found += count_inputs(parts[-1])
        if found == count:
            return joined(parts, "loader")
    raise ValueError(f"n: {count} anchors wanted, but the loader yields only {found} inputs.")
