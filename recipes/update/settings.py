"""The settings that all methods of ``recipes.update`` share. The options of one method are in its own file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.common.options import COUNT, RATE, Distinct, fraction
from recipes.common.recipe_settings import RecipeSettings
from recipes.common.settings import option


@dataclass(frozen=True, kw_only=True)
class UpdateSettings(RecipeSettings):
    """The settings of all methods.

    Attributes:
        old_epochs: Passes of the old network over the old classes.
        old_lr: Adam's highest learning rate for the old network.
        batch_size: Labelled inputs of a step, for the old network and for the update.
        held_out: The share of the old classes' training inputs that no step sees, of the old network or of an update.
        epochs: Passes of the path over the inputs of all classes.
        baseline_epochs: Passes of the other methods, which have as much time as the path.
        batch_norm: Whether the other methods normalise by the old network's running statistics, as the path does, or by
            those of each batch.
        max_flips: The budgets: shares of what the old network gets right on held-out inputs.
    """

    old_epochs: int = option("epochs of the old network", **COUNT)
    old_lr: float = option("Adam's highest learning rate for the old network", default=3e-3, **RATE)
    batch_size: int = option("labelled inputs of a step", **COUNT)
    held_out: float = option(
        "share of the old classes' training inputs that no step sees and on which budgets count",
        type=fraction,
        metavar="SHARE",
    )
    epochs: float = option("epochs of the path", **RATE)
    baseline_epochs: float = option("epochs of the other methods, for about equal time", **RATE)
    batch_norm: Literal["frozen", "batch"] = option(
        "normalise by the old network's statistics, or by each batch's, in the other methods",
        default="frozen",
        choices=["frozen", "batch"],
    )
    max_flips: tuple[float, ...] = option(
        "budgets: shares of the held-out inputs that the old network gets right and whose prediction may change",
        type=fraction,
        nargs="+",
        metavar="X",
        action=Distinct,
    )
