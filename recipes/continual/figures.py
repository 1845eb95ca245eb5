"""Figures of both continual-learning recipes: methods side by side, scores of single images, and weight space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from sklearn.decomposition import PCA
from torch import Tensor

from recipes.common.figures import plain, save
from recipes.continual.methods import METHODS

FIRST: dict[str, Any] = {"color": "#1f5fa8", "marker": "o"}
SECOND: dict[str, Any] = {"color": "#d9730d", "marker": "s"}
_BARS = ("#1f5fa8", "#d9730d", "0.35", "#9dbfe3")


def bars(
    path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], kinds: Mapping[str, str]
) -> None:
    """The methods side by side (Fig. 2F): means over seeds, with standard deviations if there are several.

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
    plain(axes)
    save(figure, path)


def score_maps(
    path: Path,
    found: Mapping[str, tuple[Sequence[int], Tensor]],
    parts: Sequence[str],
    *,
    along: str,
) -> None:
    """The probability that networks give to the right class of single test images (Fig. 2C, 2E).

    Args:
        path: The file.
        found: For each method a number for each network, and the scores ``(networks, images)``.
        parts: The names of the parts that the images are from, in this order; each part has as many images.
        along: What the numbers of the networks count.
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
    save(figure, path)


def weight_space(path: Path, found: Mapping[str, Tensor]) -> None:
    """The networks of each method in the plane of their first two principal components (Fig. 2B).

    Args:
        path: The file.
        found: For each method the parameters ``(networks, n)`` of networks on its way, the start network first.
    """
    points = np.concatenate([weights.numpy() for weights in found.values()])
    pca = PCA(
        2, svd_solver="covariance_eigh" if points.shape[1] < 500 else "randomized", random_state=0
    )
    plane = pca.fit_transform(points)
    figure, axes = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    begun = 0
    styles = (FIRST, SECOND, {"color": "#4c9150", "marker": "^"})
    for (method, weights), style in zip(found.items(), styles, strict=False):
        part = plane[begun : begun + len(weights)]
        begun += len(weights)
        axes.plot(*part.T, label=METHODS[method].title, markersize=4, linewidth=1.2, **style)
    axes.plot(*plane[0], "*", color="black", markersize=13, label="start network")
    shares = 100 * pca.explained_variance_ratio_
    axes.set_xlabel(f"first principal component ({shares[0]:.0f} %)")
    axes.set_ylabel(f"second ({shares[1]:.0f} %)")
    axes.legend(frameon=False)
    plain(axes)
    save(figure, path)
