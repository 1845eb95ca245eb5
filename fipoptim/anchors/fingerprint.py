"""Numbers by which reference outputs are known again: close where only rounding differs, and else far apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Fingerprint = tuple[float, ...]

PROJECTIONS = 8
# Relative to the length of the outputs: above the rounding of float32 on another machine, below any drift that counts.
TOLERANCE = 1e-5
_WIDTH = 2**14  # of the blocks of numbers that are projected at a time


def fingerprint_of(reference: Tensor) -> Fingerprint:
    """``(N, m, ‖z_ref‖, p_1, …, p_8)`` of reference outputs ``(N, m)``.

    The ``p_k`` are inner products with fixed random signs; where outputs differ by ``r`` each differs by about ``‖r‖``.
    """
    flat = reference.detach().reshape(-1)
    seeded = torch.Generator("cpu").manual_seed(0)

    def signs(*shape: int) -> Tensor:
        drawn = torch.randint(2, shape, generator=seeded, device="cpu", dtype=torch.float64)
        return drawn.mul_(2).sub_(1)

    columns = signs(_WIDTH, PROJECTIONS)
    projected = torch.zeros(PROJECTIONS, dtype=torch.float64, device="cpu")
    squared = 0.0
    for block in flat.split(_WIDTH):
        numbers = block.to("cpu", torch.float64)
        projected += signs(PROJECTIONS) * (numbers @ columns[: len(numbers)])
        squared += float(numbers @ numbers)
    rows, width = reference.shape
    return (float(rows), float(width), math.sqrt(squared), *projected.tolist())


def same_reference(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two fingerprints are those of the same outputs, up to rounding."""
    if len(a) != len(b) or tuple(a[:2]) != tuple(b[:2]):
        return False
    scale = max(a[2], b[2])
    return all(abs(x - y) <= TOLERANCE * scale for x, y in zip(a[2:], b[2:], strict=True))
