"""What the ranks have to agree on: the parameters and options of an optimizer, and what kind of step is taken."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fipoptim.gradients import SecondaryGradient
from fipoptim.metric.parameters import parameter_names
from fipoptim.ranks import Ranks


def agree_on_options(
    ranks: Ranks, model: nn.Module, groups: Sequence[dict[str, Any]], options: Mapping[str, Any]
) -> None:
    """Refuse parameters or options that differ between the ranks, and take the seed of rank 0.

    Args:
        ranks: The ranks.
        model: The model that owns the parameters.
        groups: The optimizer's groups, whose ``seed`` is written.
        options: Further options, by name.

    Raises:
        ValueError: On every rank, with what differs.
    """
    if ranks.alone:
        return
    ranks.refuse_differing(
        {"params": [_told(parameter_names(model, g["params"])) for g in groups]},
        "Every rank moves the same parameters. ZeroRedundancyOptimizer, which divides them among the ranks, is not "
        "supported: use torch.distributed.fsdp.fully_shard (FSDP2), which divides every parameter.",
    )
    apart = {"params", "seed", "reference"}
    ranks.refuse_differing(
        {
            f"{name} of group {i}": group[name]
            for i, group in enumerate(groups)
            for name in sorted(group.keys() - apart)
        }
        | {name: repr(value) for name, value in options.items()},
        "Give every rank the same options.",
    )
    seed = ranks.first(groups[0]["seed"])
    for group in groups:
        group["seed"] = seed


def _told(names: list[str]) -> str:
    """Names in a few words, which are others for other names."""
    whole = hashlib.blake2b("\n".join(names).encode(), digest_size=4).hexdigest()
    return f"{len(names)} from {names[0]!r} to {names[-1]!r} ({whole})"


def agree_on_step(ranks: Ranks, b: SecondaryGradient, count: int) -> None:
    """Refuse a step that is not the same on all ranks, before any of them waits for another in vain.

    Args:
        ranks: The ranks.
        b: The gradient on this rank.
        count: The number of steps taken so far.

    Raises:
        RuntimeError: On every rank.
    """
    objective = b.tensors is not None
    if not ranks.agree(len(b.parameters), objective, count):
        what = f"moves {len(b.parameters)} parameters" if objective else "has no gradient"
        raise RuntimeError(
            f"step: the ranks do not take the same step: number {count + 1} of rank {ranks.rank} {what}, and not so on "
            "another. A batch is skipped on all ranks or on none, and every rank loads the same state. No weight was "
            "changed."
        )
