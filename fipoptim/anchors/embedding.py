"""Lookups in a table of embeddings that write nothing, and whose derivative both modes of autograd take alike.

torch's own do neither. They renormalise the table in place (``max_norm``); their backward pass gives the padding row no
gradient and may divide gradients by how often a row was read (``scale_grad_by_freq``), while their forward mode does
not know of it; and bags of embeddings have neither a forward mode nor a second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Padding = list[tuple[Tensor, int]]


class PureLookups(TorchFunctionMode):
    """Within it, ``nn.Embedding``, ``nn.EmbeddingBag`` and their functional forms compute what they always do, and

    * a padding row has no derivative through a lookup; it keeps that of every other use of a tied weight;
    * ``max_norm`` leaves the table as it is: the rows are rescaled as they are read, and differentiated so;
    * gradients are neither divided by the frequency of a row nor sparse.

    Attributes:
        padding: The tables that were looked up with a padding row, each with that row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.padding: Padding = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace a lookup, and let everything else be."""
        kwargs = kwargs or {}
        if func not in _REPLACEMENTS:
            return func(*args, **kwargs)
        return _REPLACEMENTS[func](self.padding, *args, **kwargs)


def _embedding(
    paddings: Padding,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding``."""
    rows = F.embedding(input, weight, padding_idx)
    if max_norm is not None:
        length = torch.linalg.vector_norm(rows, norm_type, dim=-1, keepdim=True)
        # The formula of torch.embedding_renorm_. A row that was rescaled before may be longer by rounding alone: its
        # derivative is that of the rows within the norm, as a step inwards is one.
        scale = max_norm / (length + 1e-7)
        scale = torch.where(length > max_norm * (1 + 1e-5), scale, scale.detach())
        rows = torch.where(length > max_norm, rows * scale, rows)
    if padding_idx is None:
        return rows
    padding = input == _noted(paddings, weight, padding_idx)
    # Reverse mode knows of it already, and a checkpointed part must save the same when it is evaluated again outside.
    if forward_ad.unpack_dual(rows).tangent is not None:
        rows = torch.where(padding.unsqueeze(-1), rows.detach(), rows)
    return rows


def _aten_embedding(
    paddings: Padding,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``torch.embedding``, for which every negative ``padding_idx`` means none."""
    return _embedding(paddings, indices, weight, padding_idx if padding_idx >= 0 else None)


def _embedding_bag(
    paddings: Padding,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``F.embedding_bag``: an entry that is padding is no part of its bag."""
    if input.is_nested or weight.dim() != 2 or (input.dim() == 1) != (offsets is not None):
        # Rare, or wrong: torch has the words for it.
        table = weight if max_norm is None else weight.clone()
        return F.embedding_bag(
            input,
            table,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    rows = _embedding(paddings, input, weight, None, max_norm, norm_type)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if padding_idx is None:
        counted = torch.ones_like(input, dtype=torch.bool)
    else:
        counted = input != _noted(paddings, weight, padding_idx)
    if offsets is None:
        bags, bag = len(input), torch.arange(len(input), device=input.device)
        bag = bag.unsqueeze(1).expand_as(input).reshape(-1)
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        bags, place = len(starts), torch.arange(len(input), device=input.device)
        bag = torch.searchsorted(starts, place.to(starts.dtype), right=True) - 1
    rows, counted = rows.reshape(-1, weight.shape[1]), counted.reshape(-1, 1)
    empty = rows.new_zeros(bags, weight.shape[1])
    if mode == "max":
        # Entries that are not counted go to a bag of their own, which nobody reads.
        bag = torch.where(counted.squeeze(1), bag, bags).unsqueeze(1).expand_as(rows)
        more = torch.cat([empty, empty[:1]])
        return more.scatter_reduce(0, bag, rows, "amax", include_self=False)[:bags]
    counted = counted.to(rows.dtype)
    total = empty.index_add(0, bag, rows * counted)
    if mode == "sum":
        return total
    number = empty[:, :1].index_add(0, bag, counted)
    return total / number.clamp(min=1)


def _noted(paddings: Padding, weight: Tensor, padding_idx: int) -> int:
    row = padding_idx + len(weight) if padding_idx < 0 else padding_idx
    paddings.append((weight, row))
    return row


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _embedding,
    torch.embedding: _aten_embedding,
    F.embedding_bag: _embedding_bag,
}
