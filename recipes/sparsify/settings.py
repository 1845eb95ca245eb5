"""The settings that all pruning methods share. The options of one method are in that method's own file."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal

from recipes.common.options import COUNT, RATE, or_none, whole
from recipes.common.recipe_settings import RecipeSettings
from recipes.common.settings import option

SWITCH: dict[str, Any] = {"action": argparse.BooleanOptionalAction}


@dataclass(frozen=True, kw_only=True)
class SparsifySettings(RecipeSettings):
    """The settings of all pruning methods.

    Attributes:
        per_layer: Whether every layer gets the sparsity by itself.
        keep: Names of layers that are not pruned.
    """

    per_layer: bool = False
    keep: tuple[str, ...] = ()
    # Without waypoints there is one stage to each sparsity.
    waypoints: bool = option(
        "visit sparsities between those that are far apart", default=True, **SWITCH
    )
    batch_size: int = option("inputs of a step", **COUNT)
    mask_every: int = option(
        "steps between two choices of the weights to keep", default=10, **COUNT
    )
    anchors: int | None = option(
        "training inputs to prune with, or none for all",
        default=None,
        type=or_none(whole(1)),
        metavar="N",
    )
    # If a method's inputs are not augmented, the dense network's outputs on them are computed once.
    augment: Literal["none", "labels", "all"] = option(
        "methods that see shifted (and flipped) inputs: none, those that train on labels, or all",
        default="none",
        choices=["none", "labels", "all"],
    )
    # Methods that train on labels see no mirror images.
    mirror: bool = option(
        "add the mirror images of inputs that are not augmented", default=False, **SWITCH
    )
    # The metric is always computed in float32.
    autocast: bool = option("minibatches in bfloat16", default=False, **SWITCH)
    # The path compares 2 T sqrt(softmax(z / T)) and distillation softmax(z / T).
    temperature: float = option("temperature at which outputs are compared", default=4.0, **RATE)
    hold_features: bool = option(
        "the path also holds what the layers compute on the way",
        default=False,
        **SWITCH,
    )
    feature_weight: float = option(
        "weight of the features in the drift (relative to their variance)", default=20.0, **RATE
    )
