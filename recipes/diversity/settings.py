"""The settings that all ensembles share. The options of one method are in ``recipes.diversity.methods``."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.common.options import COUNT, RATE, whole
from recipes.common.recipe_settings import RecipeSettings
from recipes.common.settings import option


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings(RecipeSettings):
    """The settings of all methods, and of the training of the start network.

    Attributes:
        autocast: Whether minibatches and the attacks of an objective run in bfloat16; the outputs that hold the
            function are always float32.
    """

    members: int = option("networks of an ensemble", type=whole(2), metavar="N")
    epochs: int = option("epochs of a network trained from scratch", **COUNT)
    batch_size: int = option("inputs of a training step", **COUNT)
    lr: float = option(
        "Adam's highest learning rate in training from scratch", default=3e-3, **RATE
    )
    autocast: bool = False
