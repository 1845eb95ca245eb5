"""Anchors on several ranks: what has to be the same on all of them is compared, and one word of rank 0's is taken."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fipoptim.anchors.evaluation import device_of, unwrap
from fipoptim.anchors.inputs import Inputs, named_tensors
from fipoptim.ranks import Ranks
from fipoptim.shards import (
    check_division,
    is_fully_sharded,
    is_sharded,
    named_parameters,
    ranks_of_shards,
)


def ranks_of(process_group: Any, model: Any) -> Ranks:
    """The processes that are to share the anchors of a model.

    Raises:
        TypeError: If ``process_group`` is none, or the model is sharded by FSDP1.
        ValueError: If this process is no member of the group, if the group cannot send the model's tensors, or if the
            model is divided among other ranks or in another way than by ``fully_shard``.
        RuntimeError: If the model is wrapped for several processes, and there is no process group.
    """
    ranks = Ranks.of(process_group)
    if not isinstance(model, nn.Module):
        return ranks  # refused by its type
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever uses it has imported it
    if fsdp and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise TypeError(
            "model: is sharded by FullyShardedDataParallel (FSDP1), which flattens its parameters. Use "
            "torch.distributed.fsdp.fully_shard (FSDP2), or DistributedDataParallel."
        )
    lost = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if lost and process_group is None and _is_replicated(model):
        raise RuntimeError(
            "model: is wrapped for several processes, but there is no process group any more. Call "
            "torch.distributed.init_process_group(), or give process_group=False."
        )
    check_division(unwrap(model))
    if is_fully_sharded(unwrap(model)):
        shards = ranks_of_shards(named_parameters(unwrap(model)).values())
        if process_group is not None and not ranks.same(shards):
            raise ValueError(
                "process_group: has other ranks than those that fully_shard divided the model among. Leave it out."
            )
        ranks = shards
    ranks.check_device(device_of(model))
    return ranks


def _is_replicated(model: nn.Module) -> bool:
    while isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    return isinstance(model, nn.parallel.DistributedDataParallel)


def check_enough(ranks: Ranks, **counts: int | None) -> None:
    """Refuse fewer anchors than ranks.

    Raises:
        ValueError: If a number is less than that of the ranks; None is none.
    """
    for name, count in counts.items():
        if count is not None and count < ranks.size:
            raise ValueError(
                f"{name}: {count} of them cannot be shared by {ranks.size} ranks; give at least one for each, or "
                "process_group=False to let every rank evaluate all."
            )


def refuse_differing(
    ranks: Ranks, model: nn.Module, inputs: Inputs, reference: Any, options: dict[str, Any]
) -> None:
    """Refuse anchors, or a model, that are not the same on all ranks.

    Raises:
        ValueError: On every rank, with what differs.
    """
    if ranks.alone:
        return
    given = named_tensors(inputs)
    if isinstance(reference, Tensor):
        given |= {"reference": reference}
    ranks.refuse_differing(
        {name: _digest(x) for name, x in given.items()} | options,
        "Give every rank the same anchors, all of them: each evaluates its share. (Or process_group=False, and every "
        "rank goes its own way.)",
    )
    ranks.refuse_differing(
        {
            f"model: {name}": _digest(p)
            for name, p in named_parameters(unwrap(model)).items()
            if not is_sharded(p)
        },
        "Wrap the model in DistributedDataParallel first, which gives every rank the weights of rank 0.",
    )


def _digest(x: Tensor) -> str:
    """A few letters that tell tensors apart."""
    x = x.detach().cpu().contiguous()
    content = hashlib.blake2b(f"{x.dtype}{tuple(x.shape)}".encode(), digest_size=8)
    content.update(ctypes.string_at(x.data_ptr(), x.numel() * x.element_size()))
    return content.hexdigest()
