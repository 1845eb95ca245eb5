"""Lengths and inner products of long flat vectors, equally precise on every processor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# BLAS sums a long dot product in an order that suits the processor. Some processors sum one number after the other, and
# a million numbers of float32 are then wrong in the fourth digit. Here torch sums pieces of a vector (in a cascade on a
# CPU, as a tree on a GPU), and the pieces are summed in float64.
_ROW = 2**8  # numbers in a piece of a norm
# Numbers in a piece of an inner product: few enough for a CPU's cache, enough to be worth a thread or a GPU kernel.
_PIECE_ON_CPU, _PIECE_ON_GPU = 2**19, 2**23


def norm(v: Tensor) -> float:
    """The Euclidean norm of a flat vector; NaN or infinite if, and only if, an entry is.

    Its relative error in float32 is at most 1e-5, and as a rule 1e-7, on every processor. A norm beyond 1e308, which
    only entries in float64 can have, is infinite.
    """
    small = 1e-15 * math.sqrt(v.numel())
    if v.dtype == torch.float64:
        result = float(torch.linalg.vector_norm(v))
    else:
        whole = v.numel() // _ROW * _ROW
        rows = torch.linalg.vector_norm(v[:whole].view(-1, _ROW), dim=1)
        parts = torch.cat([rows, v[whole:]])
        result = float(torch.linalg.vector_norm(parts, dtype=torch.float64))
    if small < result < math.inf:
        return result
    # Squares may overflow or underflow; those relative to the largest entry do not.
    largest = float(torch.linalg.vector_norm(v, math.inf)) if v.numel() else 0.0
    if not 0.0 < largest < math.inf:
        return largest
    lengths = [torch.linalg.vector_norm(a.double() / largest) for a in v.split(_PIECE_ON_CPU)]
    return largest * float(torch.linalg.vector_norm(torch.stack(lengths)))


def sums_of_products(rows: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``rows @ v``, shape ``(k,)``, summed in float64 on the vectors' device; products are taken in ``dtype``.

    Products are taken in the vectors' own precision if ``dtype`` is None.
    """
    at_once = _PIECE_ON_CPU if v.device.type == "cpu" else _PIECE_ON_GPU
    piece = max(2**12, at_once // max(2, len(rows)))
    sums = [
        (a.to(dtype or a.dtype) * b.to(dtype or b.dtype)).sum(dim=1)
        for a, b in zip(rows.split(piece, dim=1), v.split(piece), strict=True)
    ]
    return torch.stack(sums).sum(dim=0, dtype=torch.float64)
