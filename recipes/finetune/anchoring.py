"""The anchors of a run, which are the same for every method that holds any."""

from __future__ import annotations

import torch
from torch import nn

from fipoptim import AnchorBatch
from recipes.finetune.case import AT_ONCE, Case, count
from recipes.finetune.settings import FinetuneSettings


def anchors_of(
    model: nn.Module, case: Case, settings: FinetuneSettings, *, seed: int, check: bool
) -> AnchorBatch:
    """The anchors of a case with the outputs that ``model`` has now; each step draws the same for a seed.

    Args:
        model: The network.
        case: The case.
        settings: The settings.
        seed: The seed of the draws.
        check: Whether to take the check inputs, too, which only a budget needs.
    """
    return AnchorBatch(
        model,
        dict(case.anchors),
        check=dict(case.check) if check else None,
        output=case.output,
        batch_size=min(settings.anchor_batch, count(case.anchors)),
        chunk_size=AT_ONCE,
        generator=torch.Generator().manual_seed(seed),
    )
