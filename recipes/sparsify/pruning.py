"""Runs a pruning method by its name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recipes.common.augment import Augment
from recipes.common.data import Task
from recipes.common.progress import Progress
from recipes.common.training import steps_an_epoch
from recipes.sparsify.dense import Dense
from recipes.sparsify.methods import METHODS
from recipes.sparsify.outcome import Outcome
from recipes.sparsify.settings import SparsifySettings


def sparsify(
    method: str,
    dense: Dense,
    task: Task,
    sparsities: Sequence[float],
    settings: SparsifySettings,
    *,
    augment: Augment | None,
    seed: int,
    progress: Progress = lambda steps, text: None,
) -> Outcome:
    """Goes from the dense network to each sparsity in turn.

    Args:
        method: One of ``METHODS``.
        dense: The dense network; left as it is.
        task: The data. ``settings.anchors`` of its training inputs are drawn to prune with; labels are read only by
            methods that train on labels.
        sparsities: Shares of zeros, in increasing order.
        settings: The settings.
        augment: The augmentation that ``settings.augment`` may ask for.
        seed: The seed of the batches, the anchors and the random masks.
        progress: Called with the number of steps just taken and a text.

    Returns:
        The networks, one for each sparsity, and the path to them.

    Raises:
        FloatingPointError: If weights are no longer finite.
    """
    torch.manual_seed(seed)
    run = METHODS[method](dense, task, settings, augment=augment, seed=seed, progress=progress)
    return run.run(sparsities)


def total_steps(
    method: str, task: Task, sparsities: Sequence[float], settings: SparsifySettings
) -> int:
    """The number of steps that :func:`sparsify` takes."""
    epochs = sum(leg.epochs for leg in METHODS[method].legs(sparsities, settings))
    return epochs * steps_an_epoch(task, settings.batch_size)
