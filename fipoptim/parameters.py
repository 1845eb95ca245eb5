"""The parameters that one step moves, each with the options of its group."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from fipoptim.flat import FlatVectors
from fipoptim.shards import local, space_of
from fipoptim.solver.space import WHOLE, Space

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class StepParameters:
    """The parameters of one step, in the order of the groups.

    Attributes:
        originals: The parameters, as the model and the optimizer's state have them.
        tensors: What a step moves: the parameters themselves, or of those that are divided among ranks the part that
            this rank has.
        lr: The step length of each parameter's group.
        beta: The weight of the secondary objective, for each parameter; NaN where the run is still to choose it.
        momentum: The decay of the running mean, for each parameter.
        keep_zeros: Whether weights that are zero do not move, for each parameter.
        matrix: Whether the weights may be measured as a matrix, for each parameter: as its group says, False if the
            group keeps zeros, None if it says nothing. :meth:`but_for` makes some of the latter False.
    """

    originals: list[Tensor]
    tensors: list[Tensor]
    lr: list[float]
    beta: list[float]
    momentum: list[float]
    keep_zeros: list[bool]
    matrix: list[bool | None]

    @classmethod
    def of_groups(cls, groups: Groups, wanted: Callable[[Mapping[str, Any], Tensor], bool]) -> Self:
        """Those parameters of ``groups`` for which ``wanted(group, parameter)`` holds."""
        found = [(p, g) for g in groups for p in dict.fromkeys(g["params"]) if wanted(g, p)]
        return cls(
            originals=[p for p, _ in found],
            tensors=[local(p) for p, _ in found],
            lr=[float(g["lr"]) for _, g in found],
            beta=[math.nan if g["beta"] == "auto" else float(g["beta"]) for _, g in found],
            momentum=[float(g["momentum"]) for _, g in found],
            keep_zeros=[g["keep_zeros"] for _, g in found],
            matrix=[False if g["keep_zeros"] else g.get("matrix") for _, g in found],
        )

    def __len__(self) -> int:
        """The number of parameters."""
        return len(self.tensors)

    def with_beta(self, chosen: float) -> Self:
        """The same with ``chosen`` where the weight was still to be chosen."""
        return replace(self, beta=[chosen if math.isnan(beta) else beta for beta in self.beta])

    def but_for(self, others: Collection[Tensor]) -> Self:
        """The same, with ``others`` not measured as matrices unless their groups say so."""
        matrix = [
            False if said is None and p in others else said
            for p, said in zip(self.originals, self.matrix, strict=True)
        ]
        return replace(self, matrix=matrix)

    @cached_property
    def flat(self) -> FlatVectors:
        """The layout of flat vectors over these parameters."""
        return FlatVectors(self.tensors)

    @cached_property
    def space(self) -> Space:
        """The space of flat vectors over these parameters."""
        return space_of(self.originals)

    @property
    def length(self) -> float:
        """The length of the step: the largest of the groups."""
        return max(self.lr)

    @property
    def stretch(self) -> list[float]:
        """For each parameter the ratio of the step's length to its group's, bounded for float32's sake."""
        return [min(self.length / lr, 1e15) for lr in self.lr]

    @cached_property
    def zeros(self) -> list[Tensor] | None:
        """The weights that do not move: for each parameter a bool tensor, True at a zero that is to stay.

        None if no group keeps zeros.
        """
        if not any(self.keep_zeros):
            return None
        return [
            p == 0 if keep else torch.zeros_like(p, dtype=torch.bool)
            for p, keep in zip(self.tensors, self.keep_zeros, strict=True)
        ]


def all_params(groups: Groups) -> list[Tensor]:
    """Every parameter of the groups, once."""
    return list(dict.fromkeys(p for group in groups for p in group["params"]))


def displace(
    params: list[Tensor],
    start: Iterable[Tensor],
    step: list[Tensor] | None = None,
    factor: float = 1.0,
) -> None:
    """Set the parameters to ``start + factor * step``; to ``start``, bit for bit, without a step."""
    torch._foreach_copy_(params, list(start))
    if step is not None and factor > 0:
        torch._foreach_add_(params, step, alpha=factor)


def distance(params: list[Tensor], start: Iterable[Tensor], space: Space = WHOLE) -> float:
    """The Euclidean distance of the parameters from ``start``, in float64; 0 for no parameters."""
    parts = [(p - q).double().norm().cpu() for p, q in zip(params, start, strict=True)]
    return space.length(float(torch.stack(parts).norm()) if parts else 0.0)
