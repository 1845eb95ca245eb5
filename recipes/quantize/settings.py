"""The settings that all methods of ``recipes.quantize`` share. The options of one method are in its own file."""

from __future__ import annotations

from dataclasses import dataclass

from fipoptim.secondary.quantized import LEAST_BITS, MOST_BITS
from recipes.common.options import COUNT, RATE, Distinct, or_none, whole
from recipes.common.recipe_settings import RecipeSettings
from recipes.common.settings import option


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings(RecipeSettings):
    """The settings of all methods.

    Attributes:
        bits: The bits of a weight; every number of bits is reached from the dense network.
        anchors: Training inputs without labels that all methods quantize with; None stands for all.
        views: How often each of them is there: as it is, and shifted (and flipped) at random.
        batch_size: Inputs of a step.
        temperature: The temperature at which path and distillation compare outputs.
        chunk_size: Inputs evaluated at a time; with batch norm, the batch that statistics are those of.
    """

    bits: tuple[int, ...] = option(
        "bits of a weight, each from the dense network",
        default=(8, 4, 3, 2),
        nargs="+",
        type=whole(LEAST_BITS, MOST_BITS),
        action=Distinct,
        metavar="K",
    )
    anchors: int | None = option(
        "unlabelled training inputs to quantize with, or none for all",
        default=500,
        type=or_none(whole(1)),
        metavar="N",
    )
    views: int = option(
        "views of each: as it is, and shifted (and flipped) at random", default=1, **COUNT
    )
    batch_size: int = option("inputs of a step", default=64, **COUNT)
    temperature: float = option("temperature at which outputs are compared", default=4.0, **RATE)
    chunk_size: int = option("inputs evaluated at a time", default=250, **COUNT)
