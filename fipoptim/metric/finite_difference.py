"""Differences of a network's outputs along a line in weight space, with how far they may be from the derivative.

The line starts not at today's weights but beside them. A trained, pruned or freshly adapted network often lies exactly
on kinks (dead units, tied maxima, zeros of LoRA), where a difference is the mean of two slopes and the derivative is
one of them. Kinks, curvature and the rounding of the coarsest precision inside the model are measured on the line
itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fipoptim.anchors.inputs import Inputs
from fipoptim.anchors.refusals import is_finite, outputs_not_finite, random_model
from fipoptim.metric.compare import close
from fipoptim.metric.point import Parameters, Point

# How far from today's weights the line starts, in units of each parameter's root mean square; ten times as far for a
# parameter that is zero, as nothing passes through it. The shorter distances are tried if the outputs are not finite.
DISTANCES = (0.1, 1e-3, 0.0)
# Steps along the line in the same units. The first ones settle most models.
STEPS = (1e-3, 1e-2, 1e-4, 1e-1, 5e-1, 1e-5, 1e-6, 1e-7)


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all entries together, in float64."""
    norms = [float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in tensors]
    return math.sqrt(math.fsum(x * x for x in norms))


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The inner product of all entries together, in float64."""
    return math.fsum(
        float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True)
    )


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names of parameters, for a message."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more parameters"


@dataclass(frozen=True)
class Difference:
    """A central difference of the outputs along the line.

    Attributes:
        step: Half its width h.
        slope: The estimate of the derivative along the line, shape ``(N, m)``.
        spread: How far the slope may be from the derivative by curvature, kinks and rounding, in Euclidean norm:
            the distance of the slope of half the width, or of the two one-sided slopes, whichever is larger.
        rounding: How far the slope may be by the rounding that is known of.
        still: Whether no output moved at all.
    """

    step: float
    slope: Tensor
    spread: float
    rounding: float
    still: bool

    @property
    def allowance(self) -> float:
        """The most that the slope may differ from the derivative, in Euclidean norm."""
        return self.spread + self.rounding


class Line:
    """A line through a point beside today's weights, in a random direction; used inside the network's evaluation.

    Args:
        point: Today's weights.
        inputs: The few anchors to evaluate.
        padding_rows: The rows of each parameter that have no derivative: the line does not move along them.
        seed: The seed of the random direction.

    Attributes:
        eps: The relative rounding of the coarsest precision inside the model.
        here: The parameters of today.
        near: The parameters where the line starts.
        direction: The direction of the line, a tensor in the shape of each parameter.
        cotangent: Random numbers in the shape of the outputs.
        outputs: The outputs where the line starts, shape ``(N, m)``.

    Raises:
        ValueError: If the model is random in eval mode.
        RuntimeError: If the outputs of today are not finite, or the model writes to its parameters.
    """

    def __init__(
        self,
        point: Point,
        inputs: Inputs,
        padding_rows: Mapping[str, Sequence[int]],
        seed: int,
    ) -> None:
        self._point, self._inputs = point, inputs
        self.here = point.parameters
        z = self._outputs_of_today()
        seeded = torch.Generator(device="cpu").manual_seed(seed)

        def random(like: Tensor) -> Tensor:
            drawn = torch.randn(like.shape, generator=seeded, dtype=torch.float64, device="cpu")
            return drawn.to(like)

        def offset(name: str, p: Tensor, scale: float) -> Tensor:
            drawn = scale * random(p)
            for row in padding_rows.get(name, []):
                drawn[row] = 0.0
            return drawn

        self.cotangent = random(z)
        scales = _scales(list(self.here.values()))
        self.near, self.outputs = self._start(
            [
                offset(name, p, scale if bool(p.any()) else 10 * scale)
                for (name, p), scale in zip(self.here.items(), scales, strict=True)
            ]
        )
        scales = _scales(list(self.near.values()))
        self.direction = [
            offset(name, p, scale)
            for (name, p), scale in zip(self.near.items(), scales, strict=True)
        ]
        self._differences: list[Difference] = []

    def differences(self) -> Iterator[Difference]:
        """The differences at all steps whose outputs are finite; each is computed at its first use and kept."""
        smallest = 100 * torch.finfo(self.outputs.dtype).eps
        for i, step in enumerate(h for h in STEPS if h >= smallest):
            if i == len(self._differences):
                self._differences.append(self.difference(step))
            if math.isfinite(self._differences[i].allowance):
                yield self._differences[i]

    def difference(self, step: float, part: Sequence[bool] | None = None) -> Difference:
        """The difference of half width ``step``.

        Args:
            step: Half the width.
            part: For each parameter whether it moves; None moves all.
        """
        moved = {
            h: self._point.outputs(self._inputs, self._moved(h, part))
            for h in (-step, -step / 2, step / 2, step)
        }
        z = self.outputs.double()
        wide, narrow = (
            (moved[h].double() - moved[-h].double()) / (2 * h) for h in (step, step / 2)
        )
        bend = norm_of([moved[step].double() - 2 * z + moved[-step].double()])
        spread = max(norm_of([wide - narrow]), bend / (2 * step))
        rounding = self.eps * norm_of([z]) / step
        still = all(torch.equal(x, self.outputs) for x in moved.values())
        return Difference(step, wide, spread, rounding, still)

    def _moved(self, h: float, part: Sequence[bool] | None) -> Parameters:
        part = part or [True] * len(self.direction)
        return {
            name: p + h * v if moves else p
            for (name, p), v, moves in zip(self.near.items(), self.direction, part, strict=True)
        }

    def _outputs_of_today(self) -> Tensor:
        """The outputs at today's weights, which two evaluations have to agree on; finds the precision on the way."""
        torch.manual_seed(0)
        with Precision() as precision:
            z = self._point.outputs(self._inputs, self.here)
        if not is_finite(z):
            raise outputs_not_finite()
        self.eps = max(precision.eps, torch.finfo(z.dtype).eps)
        torch.manual_seed(1)
        if not close(self._point.outputs(self._inputs, self.here), z, max(1e-4, self.eps)):
            raise random_model()
        return z

    def _start(self, offsets: list[Tensor]) -> tuple[Parameters, Tensor]:
        """Parameters beside today's and the outputs there."""
        for distance in DISTANCES:
            near = {
                name: p + distance * offset
                for (name, p), offset in zip(self.here.items(), offsets, strict=True)
            }
            before = {name: p.clone() for name, p in near.items()}
            try:
                z = self._point.outputs(self._inputs, near)
            except (RuntimeError, ValueError, ArithmeticError):
                if distance == 0:
                    raise
                continue
            written = [name for name, p in near.items() if not torch.equal(p, before[name])]
            if written:
                raise RuntimeError(
                    f"model: it writes to {listed(written)} as it is evaluated, so to look at the function "
                    "changes it. Compute the changed weight without writing it, as "
                    "torch.nn.utils.parametrize does, or do it after each step."
                )
            if is_finite(z) or distance == 0:
                break
        return near, z


class Precision(TorchDispatchMode):
    """Finds the coarsest relative rounding among the results of all operations inside it.

    Attributes:
        eps: That rounding; 0 before any operation.
    """

    eps = 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Carry out the operation."""
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.is_floating_point():
                self.eps = max(self.eps, torch.finfo(x.dtype).eps)
        return result


def _scales(tensors: Sequence[Tensor]) -> list[float]:
    """The root mean square of each parameter, but at least a thousandth of that of all parameters together.

    A parameter that is zero gets that of all parameters.
    """
    count = sum(p.numel() for p in tensors)
    overall = norm_of(tensors) / math.sqrt(max(1, count)) or 1.0
    return [
        max(norm_of([p]) / math.sqrt(max(1, p.numel())), 1e-3 * overall)
        if bool(p.any())
        else overall
        for p in tensors
    ]
