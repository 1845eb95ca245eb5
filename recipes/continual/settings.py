"""The settings that the recipes for one task after another share, and how files and command lines hold them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.common.options import COUNT, or_none, whole
from recipes.common.settings import option


@dataclass(frozen=True, kw_only=True)
class ContinualSettings:
    """How the tasks after the first are learnt.

    Attributes:
        methods: For each method that a recipe has tuned its options, under the method's name. Other methods have the
            defaults of their own files.
        anchors: Training inputs of each task that are remembered.
        augment: Whether the path and distillation see them turned, sheared, scaled, shifted and mixed in pairs.
        anchor_batch: How many remembered inputs each step sees; None is all.
        output_space: Outputs are compared in this space.
    """

    methods: Mapping[str, Any]
    anchors: int = option("training inputs of a task that are remembered", **COUNT)
    augment: bool = option(
        "make the anchors of each step many: affine maps, mixed in pairs (distillation gets the same)",
        default=False,
        action=argparse.BooleanOptionalAction,
    )
    anchor_batch: int | None = option(
        "anchors of each step, or none for all",
        default=None,
        type=or_none(whole(1)),
        metavar="N",
    )
    output_space: str = option(
        "what of the output is held", default="logits", choices=["logits", "probabilities"]
    )

    @property
    def views(self) -> int:
        """How many views augmentation makes of an anchor, so that a step sees ``anchor_batch`` of them."""
        return math.ceil((self.anchor_batch or self.anchors) / self.anchors)

    @property
    def anchors_drawn(self) -> int | None:
        """How many anchors are drawn for each step, before augmentation; None is all."""
        return None if self.views > 1 else self.anchor_batch
