"""Running means of the gradient and of its squares, free of the bias of a start at zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fipoptim.solver.space import WHOLE, Space

SECOND_MOMENT_DECAY = 0.999  # of the squared gradient, as Adam's
# A mean below this is set to 0. It would decay into subnormal numbers, with which a CPU computes many times slower.
_SMALLEST = {
    dtype: torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    for dtype in (torch.float32, torch.float64)
}


class Memory(Protocol):
    """The state of a step's parameters; values kept in it count once the step stands."""

    def numbers(self, name: str) -> list[float]:
        """The number kept under ``name`` for each parameter; 0 before its first step."""

    def tensors(self, name: str, of: Sequence[int] | None = None) -> list[Tensor]:
        """The tensor kept under ``name`` for each parameter, or for those numbered in ``of``; zeros at the start."""

    def keep(self, name: str, k: int, value: Tensor) -> None:
        """Keep a tensor under ``name`` for parameter number ``k``."""


def running_mean(
    gradients: list[Tensor], momenta: Sequence[float], memory: Memory
) -> list[Tensor] | None:
    """The running mean of each parameter's gradient; None if every momentum is 0.

    Args:
        gradients: One tensor a parameter.
        momenta: The decay of each parameter's mean.
        memory: Holds the means so far under ``"exp_avg"``, and under ``"exp_avg_weight"`` the weight of what they have
            seen, which a scheduler of the momentum changes on the way.
    """
    if not any(momenta):
        return None
    # The weights are on the CPU, like the counts of steps: to read them from a GPU would wait for all of its work.
    seen = [
        weight * m + (1 - m)
        for weight, m in zip(memory.numbers("exp_avg_weight"), momenta, strict=True)
    ]
    fresh = [(1 - m) / weight for m, weight in zip(momenta, seen, strict=True)]
    means = list(torch._foreach_lerp(memory.tensors("exp_avg"), gradients, fresh))
    for k, (m, mean, weight) in enumerate(zip(momenta, means, seen, strict=True)):
        if mean.device.type == "cpu":
            torch.hardshrink(mean, _SMALLEST[mean.dtype], out=mean)
        if m > 0:
            memory.keep("exp_avg", k, mean)
            memory.keep("exp_avg_weight", k, torch.tensor(weight, dtype=mean.dtype, device="cpu"))
    return means


def running_squares(
    gradients: Sequence[Tensor],
    of: Sequence[int],
    size: float,
    memory: Memory,
    space: Space = WHOLE,
) -> tuple[list[Tensor], float]:
    """The running mean of the squared gradient, for some parameters, and the unit of the gradient in it.

    The unit is 1, unless squares overflow or underflow. The means are in units of its square.

    Args:
        gradients: One tensor for each parameter numbered in ``of``.
        of: The numbers of the parameters.
        size: The length of the gradient of all parameters.
        memory: Holds the means so far under ``"exp_avg_sq"``.
        space: The space of the gradients, which may be divided among ranks.
    """
    steps = [memory.numbers("step")[k] + 1 for k in of]
    fresh = [(1 - SECOND_MOMENT_DECAY) / (1 - SECOND_MOMENT_DECAY**count) for count in steps]
    before = memory.tensors("exp_avg_sq", of)
    unit = _unit(size, before, space)
    means = _with_squares(before, gradients, fresh)
    in_units = means
    if unit != 1.0:
        before = [mean.double().div_(unit).div_(unit).to(mean) for mean in before]
        in_units = _with_squares(before, [g / unit for g in gradients], fresh)
        # The largest number of the precision stands for a mean beyond it.
        means = [mean.clamp_(max=torch.finfo(mean.dtype).max) for mean in means]
    for k, mean in zip(of, means, strict=True):
        memory.keep("exp_avg_sq", k, mean)
    return in_units, unit


def _with_squares(
    means: list[Tensor], gradients: Sequence[Tensor], fresh: list[float]
) -> list[Tensor]:
    """The means moved by the fraction ``fresh`` toward the squares."""
    running = torch._foreach_mul(means, [1 - f for f in fresh])
    torch._foreach_addcmul_(running, list(gradients), list(gradients), fresh)
    return list(running)


def _unit(size: float, means: list[Tensor], space: Space) -> float:
    """A power of two near the largest number that is squared, if its square overflows or underflows; else 1."""
    if 1e-12 < size < 1e15:
        return 1.0
    largest = max([float(mean.max()) for mean in means if mean.numel()], default=0.0)
    largest = max(size, math.sqrt(space.largest(largest)[0]))
    return 1.0 if largest == 0.0 or 1e-12 < largest < 1e15 else 2.0 ** math.frexp(largest)[1]
