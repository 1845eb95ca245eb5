"""The figure that only ``recipes.split_tasks`` draws: the accuracy of each task as others follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from recipes.common.figures import plain, save
from recipes.continual.methods import METHODS


def tasks(path: Path, found: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Each task's accuracy, task-aware, as others follow (Fig. 2E): one column a method, one line a task."""
    figure, axes = plt.subplots(
        1,
        len(found),
        figsize=(1.0 + 3.2 * len(found), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (method, rows) in zip(axes[0], found.items(), strict=True):
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(rows)))
        for task, colour in enumerate(colours):
            later = range(task, len(rows))
            values = [rows[k][task] for k in later]
            axis.plot([k + 1 for k in later], values, "o-", color=colour, markersize=3)
        means = [sum(row) / len(row) for row in rows]
        axis.plot(range(1, len(rows) + 1), means, color="black", linewidth=2.2, label="mean")
        axis.set_title(METHODS[method].title, fontsize=11, fontweight="bold")
        axis.set_xlabel("tasks learnt")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, loc="lower left")
        plain(axis)
    axes[0, 0].set_ylim(-3, 103)
    axes[0, 0].set_ylabel("test accuracy within tasks (%)")
    save(figure, path)
