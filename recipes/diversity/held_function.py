"""The start network's function, held by paths and distillation: the options, and the network that moves."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn

from recipes.common.batch_statistics import by_batch, with_statistics
from recipes.common.options import COUNT, or_none, whole
from recipes.common.settings import option
from recipes.diversity.objectives.objective import ObjectiveBatches
from recipes.diversity.source import EnsembleSource

MEASURED = 100  # batches on which the running statistics of a member are measured


@dataclass(frozen=True, kw_only=True)
class FunctionOptions:
    """The options of all methods that hold the start network's outputs."""

    group: ClassVar[str] = "holding the function"

    anchors: int | None = option(
        "training inputs that hold the function, or none for all",
        default=None,
        type=or_none(whole(1)),
        metavar="N",
    )
    anchor_batch: int = option("anchors of each step", default=128, **COUNT)
    output_space: str = option(
        "outputs that are held", default="probabilities", choices=["logits", "probabilities"]
    )
    batch_statistics: bool = option(
        "normalise by each batch's statistics on the path, and measure those of each member anew",
        default=False,
        action=argparse.BooleanOptionalAction,
    )


def moving_copy(source: EnsembleSource) -> nn.Module:
    """A copy of the start network, which is going to be optimized."""
    if source.settings.of(FunctionOptions).batch_statistics:
        return by_batch(source.start)
    return copy.deepcopy(source.start).eval()


def member_state(
    model: nn.Module, source: EnsembleSource, generator: torch.Generator
) -> dict[str, Tensor]:
    """The ``state_dict`` of the member that the moving copy is now, with running statistics if it has batch norm."""
    if not source.settings.of(FunctionOptions).batch_statistics:
        return copy.deepcopy(model.state_dict())
    batches = (x for x, _ in islice(ObjectiveBatches(source, generator), MEASURED))
    return with_statistics(model, source.start, batches).state_dict()
