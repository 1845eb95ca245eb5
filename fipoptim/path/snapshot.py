"""Copies of a network's tensors, and how two networks compare: their layout, their distance, their fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """The names and shapes that all networks of a path have in common.

    Attributes:
        parameters: The shape of every parameter. A tied parameter is listed once, under the first of its names.
        aliases: The other names of tied tensors, each with the name that the tensor is stored under.
    """

    parameters: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]

    def with_aliases(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` with tied tensors under all their names. Names of one tensor give one object."""
        return {**state, **{alias: state[name] for alias, name in self.aliases.items()}}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of ``model`` themselves, under every name they have."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    persistent = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in persistent:
            tensors[name] = buffer
    return tensors


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], Layout]:
    """CPU copies of the tensors of ``model``, each tied tensor once, and their layout."""
    state: dict[str, Tensor] = {}
    first_names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    parameters: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors_of(model).items():
        if id(tensor) in first_names:
            aliases[name] = first_names[id(tensor)]
            continue
        first_names[id(tensor)] = name
        # safetensors stores contiguous tensors only, so the memory format is not kept.
        state[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if isinstance(tensor, nn.Parameter):
            parameters[name] = tuple(tensor.shape)
    return state, Layout(parameters, aliases)


def layout_changes(before: Layout, now: Layout) -> list[str]:
    """The differences between two layouts in words, one for each name."""

    def described(layout: Layout) -> dict[str, str]:
        shapes = {name: str(shape) for name, shape in layout.parameters.items()}
        return shapes | {alias: f"tied to {name}" for alias, name in layout.aliases.items()}

    was, is_now = described(before), described(now)
    return [
        f"{name} was {was.get(name, 'no parameter')} and is {is_now.get(name, 'none any more')}"
        for name in was | is_now
        if was.get(name) != is_now.get(name)
    ]


def flat_numbers(tensor: Tensor) -> Tensor:
    """The entries as one float64 vector. A complex entry gives two numbers, its real and its imaginary part."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.reshape(-1).double()


def difference(a: Tensor, b: Tensor) -> Tensor:
    """``a - b``, and 0 at equal entries.

    Infinite entries can be equal, and NaN counts as equal to NaN: a mask that is a parameter may hold either.
    """
    equal = (a == b) | (a.isnan() & b.isnan())
    return (a - b).masked_fill_(equal, 0.0)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], layout: Layout) -> float:
    """The Euclidean distance between the parameters of two networks of this layout. Buffers do not count."""
    parts = [
        torch.linalg.vector_norm(difference(flat_numbers(a[name]), flat_numbers(b[name])))
        for name in layout.parameters
    ]
    return float(torch.linalg.vector_norm(torch.stack(parts))) if parts else 0.0


def check_fit(model_tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Check that a recorded network can be loaded into a model.

    Args:
        model_tensors: The model's tensors under all their names, from ``tensors_of``.
        state: The recorded tensors under all their names.

    Raises:
        ValueError: If names, shapes, ties or kinds (float, complex or whole numbers) differ, or if a tensor of the
            model is on the meta device. The message lists all problems.
    """
    own = model_tensors
    problems = [f"{name} is not in the path" for name in own if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(own[name].shape)} in the model and {tuple(state[name].shape)} in the path"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    problems += [
        f"{name} is {own[name].dtype} in the model and {state[name].dtype} in the path"
        for name in own
        if name in state and _kind(own[name]) != _kind(state[name])
    ]
    problems += [f"{name} is on the meta device" for name in own if own[name].is_meta]
    first_names: dict[int, str] = {}
    for name, tensor in own.items():
        first = first_names.setdefault(id(tensor), name)
        if {first, name} <= state.keys() and state[first] is not state[name]:
            problems.append(f"{first} and {name} are one tensor in the model and two in the path")
    if problems:
        raise ValueError(
            "model: is not of the architecture that was recorded: "
            + "; ".join(problems)
            + ". Give a model built as the recorded one was."
        )


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "float" if tensor.is_floating_point() else "whole"
