"""Flat vectors: one vector ``(n,)`` for the numbers of several parameters, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


def parameter_names(model: nn.Module, params: Iterable[Tensor]) -> list[str]:
    """The names of ``params`` in ``model``, if a metric can be taken over them.

    Args:
        model: The anchors' model.
        params: The parameters.

    Raises:
        ValueError: If a parameter is not the model's.
        TypeError: If a parameter is complex, integer, sparse or of half precision.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for i, p in enumerate(params):
        if id(p) not in names:
            raise ValueError(
                f"params: parameter {i} of shape {tuple(p.shape)} does not belong to the anchors' model "
                f"({type(model).__name__}). Build the AnchorBatch on the model that is optimized; if "
                "the model was replaced or moved since, build both anew."
            )
        check_parameter(names[id(p)], p)
        found.append(names[id(p)])
    return found


def check_parameter(name: str, p: Tensor) -> None:
    """Refuse a parameter over which no metric can be taken.

    Raises:
        TypeError: If ``p`` is complex, integer, sparse or of half precision.
    """
    if p.layout != torch.strided:
        raise TypeError(f"params: {name} is sparse ({p.layout}); fipoptim needs dense parameters.")
    if p.dtype not in (torch.float32, torch.float64):
        advice = (
            "keep the weights in float32 and use torch.autocast for the forward pass"
            if p.dtype in (torch.float16, torch.bfloat16)
            else "freeze it or leave it out"
        )
        raise TypeError(
            f"params: {name} has dtype {p.dtype}; the metric needs real float32 or float64: {advice}."
        )


@dataclass(frozen=True)
class FlatVectors:
    """How the numbers of some parameters lie in one vector.

    Attributes:
        names: The parameters' names in the model.
        shapes: Their shapes.
        dtypes: Their precisions, float32 or float64.
        devices: Their devices; flat vectors are on the first one.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]

    @classmethod
    def of(cls, names: Iterable[str], params: Sequence[Tensor]) -> FlatVectors:
        """The layout of ``params``, of which there is at least one."""
        return cls(
            tuple(names),
            tuple(p.shape for p in params),
            tuple(p.dtype for p in params),
            tuple(p.device for p in params),
        )

    @cached_property
    def sizes(self) -> list[int]:
        """How many numbers each parameter has."""
        return [shape.numel() for shape in self.shapes]

    @cached_property
    def size(self) -> int:
        """The number n of all numbers."""
        return sum(self.sizes)

    @cached_property
    def dtype(self) -> torch.dtype:
        """float64 if a parameter is, else float32."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    def empty(self) -> Tensor:
        """A flat vector without values."""
        return torch.empty(self.size, dtype=self.dtype, device=self.devices[0])

    def zeros(self) -> Tensor:
        """The flat vector 0."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.devices[0])

    def check_vector(self, v: Tensor) -> None:
        """Refuse a tensor that is not a flat vector.

        Raises:
            ValueError: If ``v`` does not have the shape ``(n,)``.
        """
        if v.shape != (self.size,):
            raise ValueError(
                f"v: must be a flat vector of shape ({self.size},), got {tuple(v.shape)}."
            )

    def flatten(self, parts: Iterable[Tensor]) -> Tensor:
        """Tensors in the shapes of the parameters as one flat vector ``(n,)``; float64 if one of them is."""
        parts = list(parts)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32
        device = self.devices[0]
        # The gradient of an embedding may be sparse.
        return torch.cat([p.detach().to_dense().reshape(-1).to(device, dtype) for p in parts])

    @torch.inference_mode(False)
    def unflatten(self, v: Tensor) -> list[Tensor]:
        """The flat vector ``v`` ``(n,)`` in the shapes and precisions of the parameters; views if the precisions agree.

        Raises:
            ValueError: If ``v`` does not have the shape ``(n,)``.
        """
        self.check_vector(v)
        if v.is_inference():
            v = v.clone()
        return [
            part.to(device, dtype)
            for part, device, dtype in zip(self.views(v), self.devices, self.dtypes, strict=True)
        ]

    def views(self, v: Tensor) -> list[Tensor]:
        """Views of the flat vector ``v`` ``(n,)`` in the shapes of the parameters and in its own precision."""
        parts = v.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


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
