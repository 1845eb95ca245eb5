"""Flat vectors ``(n,)`` in place of one tensor a parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class FlatVectors:
    """The layout of flat vectors over some parameters, in the parameters' order.

    Args:
        params: The parameters, at least one. Only their shapes, dtypes and devices matter.

    Attributes:
        size: The number n of weights.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self.sizes = [p.numel() for p in params]
        self.size = sum(self.sizes)

    def zeros(self) -> Tensor:
        """The flat vector 0 in the precision of the parameters: float64 if a parameter is, else float32."""
        double = any(p.dtype == torch.float64 for p in self._params)
        dtype = torch.float64 if double else torch.float32
        return torch.zeros(self.size, dtype=dtype, device=self._params[0].device)

    def check(self, v: Tensor) -> None:
        """Refuse a tensor that is no flat vector.

        Raises:
            ValueError: If ``v`` does not have the shape ``(n,)``.
        """
        if v.shape != (self.size,):
            raise ValueError(
                f"v: must be a flat vector of shape ({self.size},), got {tuple(v.shape)}."
            )

    def views(self, v: Tensor) -> list[Tensor]:
        """Views of the flat vector ``v`` in the parameters' shapes, in the precision of ``v``."""
        parts = v.split(self.sizes)
        return [part.view(p.shape) for part, p in zip(parts, self._params, strict=True)]

    @torch.inference_mode(False)
    def unflatten(self, v: Tensor) -> list[Tensor]:
        """The flat vector ``v`` in the parameters' shapes, dtypes and devices; views of ``v`` if those agree.

        Raises:
            ValueError: If ``v`` does not have the shape ``(n,)``.
        """
        self.check(v)
        if v.is_inference():
            v = v.clone()
        return [part.to(p) for part, p in zip(self.views(v), self._params, strict=True)]

    def flatten(self, parts: Iterable[Tensor]) -> Tensor:
        """Tensors in the parameters' shapes as one flat vector: float64 if a part is, else float32."""
        parts = list(parts)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32
        device = self._params[0].device
        # The gradient of an embedding may be sparse.
        return torch.cat([p.detach().to_dense().reshape(-1).to(device, dtype) for p in parts])


class FlatSum:
    """A sum of gradients as one flat vector, to which each gradient is added without a flat copy.

    Attributes:
        vector: The sum so far, shape ``(n,)``; empty before the first gradient.
    """

    def __init__(self, flat: FlatVectors) -> None:
        self._flat = flat
        self.vector = torch.empty(0, device="cpu")

    def add(self, parts: list[Tensor]) -> None:
        """Add a gradient, given as tensors in the shapes of the parameters."""
        if self.vector.numel() == 0:
            self.vector = self._flat.flatten(parts)
            self._views = self._flat.views(self.vector)
        else:
            torch._foreach_add_(self._views, [p.to_dense() for p in parts])


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a tensor of weights, seen as a matrix: its outputs, and everything else."""
    return shape[0], math.prod(shape[1:])
