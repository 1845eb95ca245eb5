"""The settings that all methods of ``recipes.hotfix`` share. The options of one method are in its own file."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.common.options import COUNT, fraction
from recipes.common.recipe_settings import RecipeSettings
from recipes.common.settings import option


@dataclass(frozen=True, kw_only=True)
class HotfixSettings(RecipeSettings):
    """The settings of all methods.

    Attributes:
        wrong: Inputs that the network gets wrong and is to get right.
        anchors: Unlabelled training inputs that methods may hold the outputs on.
        anchor_batch: Anchors of a step.
        check: Inputs on which the budget counts, and on which methods choose among their settings.
        unseen: Inputs on which every network is measured at last, and nothing else.
        max_flips: The budget of ours: the largest share of the check inputs whose prediction may change.
        max_steps: The most steps of a run.
    """

    wrong: int = option("wrong inputs to make right", default=10, **COUNT)
    anchors: int = option("unlabelled training inputs whose outputs are held", **COUNT)
    anchor_batch: int = option("anchors of a step", **COUNT)
    check: int = option("inputs on which the budget counts", **COUNT)
    unseen: int = option("inputs on which the results are measured, and nothing else", **COUNT)
    max_flips: float = option(
        "budget of the path: the share of the check inputs whose prediction may change",
        default=0.01,
        type=fraction,
        metavar="X",
    )
    max_steps: int = option("the most steps of a run", default=300, **COUNT)
