"""Parameters that ``fully_shard`` (FSDP2) has divided among ranks, each along one dimension.

Torch gives them as DTensors. Steps are taken in the parts that each rank has; no rank ever has all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from fipoptim.ranks import ALONE, Ranks
from fipoptim.solver.space import WHOLE, Part, Space

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

_USE = (
    "Use torch.distributed.fsdp.fully_shard on the whole model (its root last), on a mesh of one dimension, and "
    "nothing beside it"
)


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is divided among ranks: a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever has one has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether a parameter of the model is divided among ranks."""
    return any(is_sharded(p) for p in named_parameters(model).values())


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank has, as an alias without a graph; a whole tensor is itself.

    A change of the part that torch counts shows in the part's version, not in that of the DTensor.
    """
    if not is_sharded(tensor):
        return tensor
    detached: Any = tensor.detach()
    part: Tensor = detached.to_local()
    return part


def divided_as(tensor: Tensor, part: Tensor) -> Tensor:
    """The tensor that is divided as another one is, of which this rank has ``part``; nothing is copied."""
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part.detach(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def same_division(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are both whole, or divided among the same ranks in the same way."""
    if is_sharded(a) and is_sharded(b):
        return (a.device_mesh, a.placements) == (b.device_mesh, b.placements)
    return is_sharded(a) == is_sharded(b)


def ranks_of_shards(tensors: Iterable[Tensor]) -> Ranks:
    """The ranks among which tensors are divided; this process alone if all are whole."""
    for tensor in tensors:
        if is_sharded(tensor):
            return Ranks(tensor.device_mesh.get_group())
    return ALONE


def space_of(params: Sequence[Tensor]) -> Space:
    """The space of flat vectors over the parts of some parameters."""
    ranks = ranks_of_shards(params)
    return WHOLE if ranks.alone else Space(ranks, [part_of(p) for p in params])


def part_of(tensor: Tensor) -> Part:
    """The part of a tensor that this rank has; torch makes all parts but the last ones equally long."""
    if not is_sharded(tensor):
        return Part(tensor.shape, 0, 0, len(tensor) if tensor.dim() else 0)
    dim = tensor.placements[0].dim % tensor.dim()  # type: ignore[attr-defined]
    length = -(-tensor.shape[dim] // tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * length, tensor.shape[dim])
    return Part(tensor.shape, dim, start, local(tensor).shape[dim])


# --- models ---------------------------------------------------------------------------------------------------


def reshard(model: nn.Module) -> None:
    """Give up the whole parameters that the last forward pass of a fully sharded model has left; no communication."""
    for module in fsdp_modules(model):
        module.reshard()


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules of a model that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        yield from (m for m in model.modules() if isinstance(m, fsdp.FSDPModule))


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model by name, those that are divided among ranks as an optimizer has them."""
    reshard(model)
    return dict(model.named_parameters())


def check_division(model: nn.Module) -> None:
    """Refuse a model of which some, but not all, is divided among ranks, or in another way than by ``fully_shard``.

    Raises:
        ValueError: On every rank, with what to use.
    """
    params = named_parameters(model)
    divided = {name: p for name, p in params.items() if is_sharded(p)}
    if not divided:
        return
    for name in params:
        if name not in divided:
            raise ValueError(
                f"model: {name!r} is whole on every rank, and {next(iter(divided))!r} is divided among them. {_USE}, "
                "without ignored_params."
            )
    meshes = [p.device_mesh for p in divided.values()]
    for (name, p), mesh in zip(divided.items(), meshes, strict=True):
        if mesh.ndim != 1 or mesh != meshes[0]:
            raise ValueError(
                f"model: {name!r} lies on {mesh}, and only one mesh of one dimension is supported: no tensor "
                f"parallelism and no hybrid sharding. {_USE}."
            )
        if type(p.placements[0]) is not torch.distributed.tensor.Shard:
            raise ValueError(
                f"model: {name!r} has the placement {p.placements[0]}; only parameters that are sharded by fully_shard "
                f"are supported. {_USE}."
            )
    if next(fsdp_modules(model), None) is None:
        raise ValueError(
            f"model: its parameters are DTensors, but fully_shard was not called on it (tensor parallelism?). {_USE}."
        )
