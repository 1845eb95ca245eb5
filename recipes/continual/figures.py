"""What the recipes for one task after another draw: accuracies, drift, single images, and the way in weight space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: a recipe runs where there is no screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from torch import Tensor

from recipes.common.report import Curve, replace
from recipes.continual.learners import METHODS

_FIRST: dict[str, Any] = {"color": "#1f5fa8", "marker": "o"}
_SECOND: dict[str, Any] = {"color": "#d9730d", "marker": "s"}
_BARS = ("#1f5fa8", "#d9730d", "0.35", "#9dbfe3")


def curves(path: Path, found: Mapping[str, Curve], *, task1: str, task2: str) -> None:
    """Both accuracies along the way (Fig. 2C), one column a method, with the drift below."""
    figure, axes = plt.subplots(
        2,
        len(found),
        figsize=(0.6 + 4.2 * len(found) if len(found) < 4 else 3.2 * len(found), 5.6),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=[2.2, 1.0],
        layout="constrained",
    )
    for column, (method, curve) in enumerate(found.items()):
        top, bottom = axes[0, column], axes[1, column]
        top.axhline(curve.task1[0], color="0.5", linewidth=0.8, linestyle=":")
        for name, values, style in ((task1, curve.task1, _FIRST), (task2, curve.task2, _SECOND)):
            label = f"{name}: {values[0]:.1f} → {values[-1]:.1f}"
            top.plot(curve.steps, values, label=label, markersize=3.5, linewidth=1.6, **style)
        top.legend(loc="center left", frameon=False)
        top.set_title(METHODS[method].title, fontsize=11, fontweight="bold")
        # The start network's drift is zero, which a logarithmic axis cannot show.
        moved = [(s, d) for s, d in zip(curve.steps, curve.drift, strict=True) if d > 0]
        if moved:
            bottom.plot(*zip(*moved, strict=True), "o-", color="black", markersize=3, linewidth=1.2)
        bottom.set_yscale("log")
        bottom.set_xlabel(f"steps on {task2}")
        for axis in (top, bottom):
            _plain(axis)
            _steps(axis, max(c.steps[-1] for c in found.values()))
    axes[0, 0].set_ylim(-3, 103)
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylabel("drift on anchors")
    figure.suptitle(f"{task1}, then {task2}", fontsize=12)
    _save(figure, path)


def bars(
    path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], kinds: Mapping[str, str]
) -> None:
    """The methods side by side (Fig. 2F): means over seeds, with standard deviations where there are several.

    Args:
        path: The file.
        runs: For each method the metrics of its runs, percent.
        kinds: The metrics to draw, with their labels.
    """
    figure, axes = plt.subplots(
        figsize=(max(6.5, 1.5 + 1.5 * len(runs)), 4.2), layout="constrained"
    )
    width = 0.8 / len(kinds)
    for k, ((key, label), colour) in enumerate(zip(kinds.items(), _BARS, strict=False)):
        values = [np.array([m[key] for m in found]) for found in runs.values()]
        at = np.arange(len(runs)) + (k - (len(kinds) - 1) / 2) * width
        spread = [v.std(ddof=1) if len(v) > 1 else 0.0 for v in values]
        axes.bar(at, [v.mean() for v in values], width, yerr=spread, label=label, color=colour)
        for x, v in zip(at, values, strict=True):
            axes.text(x, v.mean() + 1, f"{v.mean():.1f}", ha="center", fontsize=6.5)
    axes.set_xticks(range(len(runs)), [METHODS[method].title for method in runs])
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 118)
    axes.legend(frameon=False, ncols=4, fontsize=8, loc="upper center")
    _plain(axes)
    _save(figure, path)


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
        _plain(axis)
    axes[0, 0].set_ylim(-3, 103)
    axes[0, 0].set_ylabel("test accuracy within tasks (%)")
    _save(figure, path)


def score_maps(
    path: Path,
    found: Mapping[str, tuple[Sequence[int], Tensor]],
    parts: Sequence[str],
    *,
    along: str,
) -> None:
    """How probable the networks on the way hold the right class of single test images (Fig. 2C, 2E).

    Args:
        path: The file.
        found: For each method a number for each network, and the scores ``(networks, images)``.
        parts: What the images are of: as many of each part, in this order.
        along: What the networks' numbers count.
    """
    figure, axes = plt.subplots(
        len(parts),
        len(found),
        figsize=(1.5 + 3.0 * len(found), 0.4 + 2.1 * max(2, len(parts))),
        squeeze=False,
        layout="constrained",
    )
    for column, (method, (numbers, score)) in enumerate(found.items()):
        rows = score.chunk(len(parts), dim=1)
        for row, (name, part) in enumerate(zip(parts, rows, strict=True)):
            axis = axes[row, column]
            image = axis.imshow(
                part.T.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis", interpolation="none"
            )
            ticks = range(0, len(numbers), max(1, len(numbers) // 5))
            axis.set_xticks(list(ticks), [str(numbers[t]) for t in ticks], fontsize=7)
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(f"{part.shape[1]} test images of\n{name}")
            if row == 0:
                axis.set_title(METHODS[method].title, fontsize=10)
            if row == len(parts) - 1:
                axis.set_xlabel(along)
    figure.colorbar(image, ax=axes, shrink=0.8, label="probability of the right class")
    _save(figure, path)


def weight_space(path: Path, found: Mapping[str, Tensor]) -> None:
    """The ways in the plane of their principal components (Fig. 2B).

    Args:
        path: The file.
        found: For each method the parameters ``(networks, n)`` on its way, the start network first.
    """
    points = np.concatenate([weights.numpy() for weights in found.values()])
    pca = PCA(
        2, svd_solver="covariance_eigh" if points.shape[1] < 500 else "randomized", random_state=0
    )
    plane = pca.fit_transform(points)
    figure, axes = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    begun = 0
    styles = (_FIRST, _SECOND, {"color": "#4c9150", "marker": "^"})
    for (method, weights), style in zip(found.items(), styles, strict=False):
        part = plane[begun : begun + len(weights)]
        begun += len(weights)
        axes.plot(*part.T, label=METHODS[method].title, markersize=4, linewidth=1.2, **style)
    axes.plot(*plane[0], "*", color="black", markersize=13, label="start network")
    shares = 100 * pca.explained_variance_ratio_
    axes.set_xlabel(f"first principal component ({shares[0]:.0f} %)")
    axes.set_ylabel(f"second ({shares[1]:.0f} %)")
    axes.legend(frameon=False)
    _plain(axes)
    _save(figure, path)


def _plain(axes: Axes) -> None:
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _steps(axes: Axes, last: int) -> None:
    # What goes wrong goes wrong in the first steps, so these get as much room as the rest.
    axes.set_xscale("symlog", linthresh=10, linscale=1.0)
    axes.set_xlim(-0.3, last * 1.08)
    ticks = [0, 5, 10, *(10**k * m for k in range(1, 7) for m in (3, 10))]
    axes.set_xticks([t for t in ticks if t <= last])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.minorticks_off()


def _save(figure: Figure, path: Path) -> None:
    replace(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    plt.close(figure)
