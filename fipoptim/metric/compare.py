"""Whether two tensors hold the same numbers: up to a tolerance, or exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether ``a`` and ``b`` agree to ``tolerance``, relative to the largest entry of ``b``."""
    largest = float(b.abs().max()) if b.numel() else 0.0
    scale = largest if math.isfinite(largest) else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors hold the same numbers; NaN equals NaN. Tensors that are not dense always pass."""
    return (
        a.layout != torch.strided
        or torch.equal(a, b)
        or bool((a.isnan() & b.isnan() | (a == b)).all())
    )
