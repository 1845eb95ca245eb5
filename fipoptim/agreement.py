"""What the ranks have to agree on: the parameters and options of an optimizer, and what kind of step is taken."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.budget import Budget
from fipoptim.gradients import SecondaryGradient
from fipoptim.metric.parameters import parameter_names
from fipoptim.parameters import Groups
from fipoptim.ranks import Ranks
from fipoptim.state import steps_taken


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


def agree_on_step(
    anchors: AnchorBatch,
    b: SecondaryGradient,
    state: dict[Tensor, Any],
    groups: Groups,
    budget: Budget,
) -> None:
    """Refuse a step that is not the same on all ranks, before any of them waits for another in vain.

    Args:
        anchors: The anchors, which know the ranks.
        b: The gradient on this rank.
        state: The optimizer's state, which knows how many steps have been taken.
        groups: The optimizer's groups, whose options schedulers change.
        budget: The bounds of now.

    Raises:
        RuntimeError: On every rank.
    """
    ranks = anchors.ranks
    if ranks.alone:
        return
    count, objective = steps_taken(state), b.tensors is not None
    options = [
        math.nan if group[name] == "auto" else float(group[name])
        for group in groups
        for name in ("lr", "beta", "momentum")
    ]
    bounds = [math.inf if x is None else x for x in (budget.max_drift, budget.max_flips)]
    moved = (len(b.parameters), float(objective), count)
    differing = ranks.differing(*moved, *options, *bounds)
    if differing - set(range(len(moved))):
        raise RuntimeError(
            "step: lr, beta, momentum or the budget differ between the ranks; set and schedule them alike on all. No "
            "weight was changed."
        )
    if differing:
        what = f"moves {len(b.parameters)} parameters" if objective else "has no gradient"
        raise RuntimeError(
            f"step: the ranks do not take the same step: number {count + 1} of rank {ranks.rank} {what}, and not so on "
            "another. A batch is skipped on all ranks or on none, and every rank loads the same state. No weight was "
            "changed."
        )
