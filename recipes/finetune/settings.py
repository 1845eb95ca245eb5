"""The settings that all methods of ``recipes.finetune`` share. The options of one method are in its own file."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.common.options import COUNT, RATE, or_none, whole
from recipes.common.recipe_settings import RecipeSettings
from recipes.common.settings import option


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(RecipeSettings):
    """The settings of all methods.

    Attributes:
        seconds: CPU seconds of a run: preparation, steps, and what a method does at its end.
        steps: Steps of a run, in place of a time; None takes as many as fit into ``seconds``.
        batch_size: New examples of a step.
        anchors: Unlabelled inputs whose outputs methods may hold.
        anchor_batch: Anchors of a step.
        check: Further unlabelled inputs, on which the budget counts.
        head: New examples of each class to which the head of the start is fitted, at most.
        train: New examples of each class on which networks are fine-tuned, at most.
        test: New examples of all classes together on which networks are measured, at most.
        queries: Unlabelled inputs on which networks are measured.
        index: Unlabelled texts among which the nearest neighbours of queries are looked up.
        max_tokens: Tokens of a text; the rest is cut off.
        rank: The rank of LoRA's matrices.
    """

    seconds: float = option("CPU seconds of a run", default=15.0, **RATE)
    steps: int | None = option(
        "steps of a run, in place of --seconds", default=None, type=or_none(whole(1)), metavar="N"
    )
    batch_size: int = option("new examples of a step", default=16, **COUNT)
    anchors: int = option("unlabelled inputs whose outputs are held", default=128, **COUNT)
    anchor_batch: int = option("anchors of a step", default=16, **COUNT)
    check: int = option("unlabelled inputs on which the budget counts", default=48, **COUNT)
    head: int = option("new examples of each class for the start's head", default=75, **COUNT)
    train: int = option("new examples of each class to fine-tune on", default=100, **COUNT)
    test: int = option("new examples to test on, at most", default=400, **COUNT)
    queries: int = option("unlabelled inputs to measure on", default=300, **COUNT)
    index: int = option("texts of the search index", default=500, **COUNT)
    max_tokens: int = option("tokens of a text", default=32, **COUNT)
    rank: int = option("rank of LoRA's matrices", default=8, **COUNT)
