"""Inputs bundled with how their outputs are read: texts that were padded to one length."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

# The keyword by which models of language are told which positions of a text count.
MASK = "attention_mask"
# Texts are cut to a multiple of this many positions, so that there are few shapes to trace.
MULTIPLE = 8


class Bundle(dict[str, Tensor]):
    """Keyword inputs of texts that had different lengths, padded with zeros along dimension 1.

    A bundle of some of the texts may be cut to the longest of them. Their outputs are padded again, so that all texts
    have outputs of one width.

    Args:
        tensors: The tensors by name.
        length: The number of positions that outputs are padded to.
        along: The names of the tensors that have the positions along dimension 1.
        positional: Whether the model gives an output for each position, rather than some for each text; None goes by
            the shape of the outputs.

    Attributes:
        length: As given.
        along: As given.
        positional: As given.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        length: int,
        along: Collection[str],
        positional: bool | None = None,
    ) -> None:
        super().__init__(tensors)
        self.length, self.along, self.positional = length, frozenset(along), positional

    def like(self, tensors: Mapping[str, Tensor], **changes: Any) -> Self:
        """Other tensors, read as these are, but for the ``changes``."""
        how: dict[str, Any] = {
            "length": self.length,
            "along": self.along,
            "positional": self.positional,
        }
        return type(self)(tensors, **(how | changes))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with ``function`` of every tensor."""
        return self.like({name: function(x) for name, x in self.items()})

    @property
    def positions(self) -> int:
        """The number of positions that these texts have now."""
        return self[MASK].shape[1]

    def trimmed(self) -> Self:
        """These texts without the positions that are behind the last one of each."""
        counted = self[MASK].any(dim=0).nonzero()
        last = int(counted.max()) + 1 if len(counted) else 1
        size = min(-(-last // MULTIPLE) * MULTIPLE, self.positions)
        if size == self.positions:
            return self
        return self.like(
            {
                name: x[:, :size].contiguous() if name in self.along else x
                for name, x in self.items()
            }
        )

    def padded(self, size: int) -> Self:
        """These texts with ``size`` positions, at least as many as they have."""
        return self.like(
            {name: pad_positions(x, size) if name in self.along else x for name, x in self.items()}
        )


def pad_positions(x: Tensor, size: int) -> Tensor:
    """``x`` ``(N, T, ...)`` with zeros at the end of dimension 1, which then has the given size."""
    if x.shape[1] == size:
        return x
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, size - x.shape[1]])


def mask_of(inputs: Any) -> Tensor | None:
    """The two-dimensional attention mask ``(N, T)`` among keyword inputs; None without one."""
    mask = inputs.get(MASK) if isinstance(inputs, dict) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def count_positions(inputs: Any) -> int | None:
    """The number of positions that the outputs of texts are padded to; None if the inputs have no mask."""
    if isinstance(inputs, Bundle):
        return inputs.length
    mask = mask_of(inputs)
    return None if mask is None else mask.shape[1]


def has_positions(z: Any, inputs: Any) -> bool:
    """Whether ``z`` holds something for each position of texts with a mask: ``(N, T, ...)`` with a third dimension."""
    mask = mask_of(inputs)
    if mask is None or not isinstance(z, Tensor):
        return False
    if isinstance(inputs, Bundle) and inputs.positional is False:
        return False
    return z.dim() > 2 and z.shape[:2] == mask.shape


def without_padding(z: Tensor, inputs: Any) -> Tensor:
    """Outputs with 0 at the padded positions of ``inputs``, padded to the length of all texts.

    Outputs that are not of positions are returned as they are.
    """
    if not has_positions(z, inputs):
        return z
    counts = inputs[MASK].to(z.device).ne(0).reshape(*z.shape[:2], *([1] * (z.dim() - 2)))
    z = torch.where(counts, z, torch.zeros((), dtype=z.dtype, device=z.device))
    return pad_positions(z, inputs.length) if isinstance(inputs, Bundle) else z
