"""The optimizer's memory of each parameter: read during a step, written once the step stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fipoptim.geometry.base import Geometry
from fipoptim.parameters import StepParameters
from fipoptim.shards import divided_as, local


class StepState:
    """The state of the parameters of one step.

    The entries of a parameter that is divided among ranks are divided as it is. They are read and kept by their parts.

    What is kept during the step counts from :meth:`commit` on; before that, the optimizer's state is as it was.

    Args:
        state: The optimizer's state, by parameter.
        parameters: The parameters of the step.
    """

    def __init__(self, state: dict[Tensor, Any], parameters: StepParameters) -> None:
        self._state, self._parameters = state, parameters
        self._params = parameters.originals
        self._new: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self._params}

    def numbers(self, name: str) -> list[float]:
        """The number kept under ``name`` for each parameter; 0 before its first step."""
        return [float(self._state.get(p, {}).get(name, 0.0)) for p in self._params]

    def tensors(self, name: str, of: Sequence[int] | None = None) -> list[Tensor]:
        """The tensor kept under ``name`` for each parameter, or for those numbered in ``of``; zeros at the start."""
        params = self._params if of is None else [self._params[k] for k in of]
        states = [self._state.get(p, {}) for p in params]
        return [
            local(state[name]) if name in state else torch.zeros_like(local(p))
            for p, state in zip(params, states, strict=True)
        ]

    def keep(self, name: str, k: int, value: Tensor) -> None:
        """Keep a tensor under ``name`` for parameter number ``k``."""
        p = self._params[k]
        self._new[p][name] = divided_as(p, value) if value.shape == local(p).shape else value

    def commit(self, geometry: type[Geometry]) -> None:
        """Write everything kept to the optimizer's state, and count the step."""
        begin_state(self._state, self._parameters, geometry)
        for p, new in self._new.items():
            self._state[p]["step"] += 1
            self._state[p] |= new


def steps_taken(state: dict[Tensor, Any]) -> int:
    """The number of steps that the optimizer has taken so far."""
    return int(max((float(entries.get("step", 0)) for entries in state.values()), default=0))


def begin_state(
    state: dict[Tensor, Any],
    parameters: StepParameters,
    geometry: type[Geometry],
    *,
    own_memory: bool = False,
) -> None:
    """Complete the state by zeros, so that its keys depend on the options and not on the run.

    Args:
        state: The optimizer's state, by parameter.
        parameters: The parameters to complete.
        geometry: The geometry, which may keep entries of its own.
        own_memory: Give each zero memory of its own, so that it can be written to.
    """
    for p, momentum, matrix in zip(
        parameters.originals, parameters.momentum, parameters.matrix, strict=True
    ):
        entries = state[p]
        if "step" not in entries:
            entries["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        if momentum > 0 and "exp_avg" not in entries:
            entries["exp_avg"] = torch.zeros_like(p)
            entries["exp_avg_weight"] = torch.zeros((), dtype=p.dtype, device="cpu")
        for name in geometry.entries(p, matrix):
            if name not in entries:
                entries[name] = torch.zeros_like(p)
        if "velocity" not in entries:
            entries["velocity"] = torch.zeros_like(p) if own_memory else no_velocity(p)


def no_velocity(p: Tensor) -> Tensor:
    """Zeros in the shape of ``p`` that take the memory of one number."""
    part = local(p)
    return divided_as(p, torch.zeros((), dtype=p.dtype, device=part.device).expand(part.shape))


def begin_within(state: dict[Tensor, Any], params: list[Tensor]) -> None:
    """Keep the value of parameters that are about to move for the first time: the network is within the budget."""
    for p in params:
        if "within" not in state[p]:
            state[p]["within"] = p.detach().clone()


def remember_within(state: dict[Tensor, Any], params: list[Tensor]) -> None:
    """Keep the network of now as the last one that is known to be within the budget."""
    for p in params:
        if "within" in state.get(p, {}):
            local(state[p]["within"]).copy_(local(p.detach()))


def last_within(state: Mapping[Tensor, Any], params: list[Tensor]) -> list[Tensor] | None:
    """The last network known to be within the budget, one tensor a parameter; None if none is known.

    Of parameters that are divided among ranks it has the parts of this rank.
    """
    kept = [state[p].get("within") if p in state else None for p in params]
    if all(x is None for x in kept):
        return None
    return [local(p.detach() if x is None else x) for p, x in zip(params, kept, strict=True)]
