"""A few numbers that identify reference outputs: close if the outputs differ by rounding only, and far apart if not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Fingerprint = tuple[float, ...]

PROJECTIONS = 8
# The largest difference between fingerprints of the same outputs, relative to the norm of the outputs: more than the
# rounding of float32 on another machine, and less than any drift that matters.
TOLERANCE = 1e-5
_WIDTH = 2**14  # how many numbers are projected at a time


def fingerprint_of(reference: Tensor) -> Fingerprint:
    """``(N, m, ‖z_ref‖, p_1, …, p_8)`` of reference outputs ``(N, m)``.

    The ``p_k`` are inner products with fixed random signs. If the outputs change by ``r``, each ``p_k`` changes by
    about ``‖r‖``.
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


def combined(first: Fingerprint, second: Fingerprint) -> Fingerprint:
    """One fingerprint for two references: it changes if either does."""
    rows, width = first[0] + second[0], first[1] + second[1]
    # In another order, so that changes that are opposite in both do not cancel.
    projections = (a + b for a, b in zip(first[3:], reversed(second[3:]), strict=True))
    return (rows, width, math.hypot(first[2], second[2]), *projections)


def same_reference(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two fingerprints are those of the same outputs, up to rounding."""
    if len(a) != len(b) or tuple(a[:2]) != tuple(b[:2]):
        return False
    scale = max(a[2], b[2])
    return all(abs(x - y) <= TOLERANCE * scale for x, y in zip(a[2:], b[2:], strict=True))
