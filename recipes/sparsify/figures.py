"""The figures of ``recipes.sparsify``: accuracy against sparsity, the path in weight space, the layers' weights."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from recipes.common.figures import save
from recipes.sparsify.methods import METHODS

_COLOURS = ("#1f5fa8", "#d9730d", "#8a5a2b", "#b03a5b", "#4c9150", "#2a9d9d", "#7a5ea8", "0.5")
_MARKERS = "osPv^<Dx"
RANDOM_NETWORKS = 12  # sparse networks with random masks, beside the path
STRIPS = 6  # networks whose connections are drawn


def accuracies(path: Path, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draws accuracy against sparsity for all methods (Fig. 3B, 3C): means over seeds and standard deviations.

    Args:
        path: The file.
        records: The records of each method's runs, one a seed.
    """
    figure, axes = plt.subplots(figsize=(7.0, 4.4), layout="constrained")
    lows = []
    for method, runs in records.items():
        k = list(METHODS).index(method)  # a method looks the same whichever others are drawn
        left = np.array([100 * (1 - n["sparsity"]) for n in runs[0]["networks"]])
        found = np.array([[n["accuracy"] for n in run["networks"]] for run in runs])
        spread = found.std(axis=0, ddof=1) if len(runs) > 1 else None
        axes.errorbar(
            left,
            found.mean(axis=0),
            spread,
            label=runs[0]["title"],
            color=_COLOURS[k % len(_COLOURS)],
            marker=_MARKERS[k % len(_MARKERS)],
            markersize=4,
            linewidth=1.6,
            capsize=2,
        )
        lows.append(found.mean(axis=0).min())
    dense = np.mean([run["dense_accuracy"] for runs in records.values() for run in runs])
    axes.axhline(dense, color="0.4", linewidth=0.8, linestyle=":", label="dense network")
    axes.set_xscale("log")
    axes.invert_xaxis()
    points = runs[0]["networks"]
    ticks = [100 * (1 - n["sparsity"]) for n in points]
    axes.set_xticks(ticks, [f"{100 - t:.4g}" for t in ticks], rotation=60, fontsize=8)
    axes.xaxis.minorticks_off()
    axes.set_xlabel(f"sparsity of {points[0]['total']:,} weights (%)")
    axes.set_ylabel("test accuracy (%)")
    # The curve of a method that fails leaves the axes at the bottom, so that it does not flatten the others.
    axes.set_ylim(max(0.0, min(lows) - 1, dense - 12) if lows else None, dense + 1)
    axes.grid(color="0.92", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    save(figure, path, dpi=120)


def weight_space(
    path: Path, points: Tensor, *, positions: Sequence[int], title: str, seed: int
) -> None:
    """Draws the path in the plane of its principal components (Fig. 3D, 3E), with random sparse networks.

    Args:
        path: The file.
        points: The networks on the path, ``(networks, weights)``; the dense network is the first.
        positions: Indices of the networks that have a sparsity asked for.
        title: The name of the path.
        seed: The seed of the masks of the random networks; their other weights are the dense network's.
    """
    generator = torch.Generator().manual_seed(seed)
    shares = torch.linspace(0.2, float((points[-1] == 0).float().mean()), RANDOM_NETWORKS)
    random = torch.stack(
        [
            points[0] * (torch.rand(points[0].shape, generator=generator) >= share)
            for share in shares
        ]
    )
    every = torch.cat([points, random]).numpy()
    plane = PCA(2, svd_solver="randomized", random_state=0).fit_transform(every)
    visited, others = plane[: len(points)], plane[len(points) :]
    figure, axes = plt.subplots(figsize=(6.0, 4.6), layout="constrained")
    axes.plot(visited[:, 0], visited[:, 1], color=_COLOURS[0], linewidth=1.2, zorder=1)
    axes.scatter(visited[:, 0], visited[:, 1], s=10, color=_COLOURS[0], label=title, zorder=2)
    ends = visited[list(positions)]
    axes.scatter(
        ends[:, 0],
        ends[:, 1],
        s=46,
        facecolor="white",
        edgecolor=_COLOURS[0],
        label="at a sparsity asked for",
        zorder=3,
    )
    axes.scatter(
        others[:, 0], others[:, 1], s=22, marker="x", color="0.5", label="random sparse networks"
    )
    axes.scatter(
        visited[:1, 0],
        visited[:1, 1],
        s=70,
        marker="*",
        color=_COLOURS[1],
        label="dense network",
        zorder=4,
    )
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second principal component")
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    save(figure, path, dpi=120)


def layers(path: Path, states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """Draws the weights left in each layer of the sparsest networks (Fig. 3F, 3G), and the overlap of their masks.

    Above there is one strip for each network, with a bar for every unit that still has inputs. Below are the sparsities
    of each layer and the overlap of every two networks' masks (intersection over union); the title says the overlap of
    two random masks of equal density.

    Args:
        path: The file.
        states: The state dicts of the networks.
        names: Names of the prunable parameters.
    """
    shown = states[:STRIPS]
    figure = plt.figure(figsize=(10.0, 6.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.0, 1.35], squeeze=False)[:, 0]
    strips = above.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    units = [int(states[0][name].shape[0]) for name in names]
    for axes, state in zip(strips, shown, strict=True):
        alive = torch.cat([(state[name] != 0).flatten(1).any(dim=1) for name in names])
        axes.imshow(
            alive[None].float().numpy(),
            aspect="auto",
            cmap="Blues",
            vmin=0,
            vmax=1,
            interpolation="none",
        )
        axes.set_yticks([])
        for edge in np.cumsum(units)[:-1]:
            axes.axvline(edge - 0.5, color=_COLOURS[1], linewidth=0.8)
    strips[0].set_title("units with inputs, layer by layer; one row a network", fontsize=10)
    strips[-1].tick_params(labelsize=8)
    if len(states) > 1:
        left, right = below.subplots(1, 2, width_ratios=[2.2, 1.0])
        _overlap(below, right, [torch.cat([(s[n] != 0).flatten() for n in names]) for s in states])
    else:
        left = below.subplots()
    sparsity = [[100 * float((s[name] == 0).float().mean()) for s in states] for name in names]
    left.boxplot(sparsity, medianprops={"color": _COLOURS[1]})
    labels = [name.removesuffix(".weight") for name in names]
    left.set_xticks(
        range(1, len(names) + 1), labels, rotation=90 if len(names) > 6 else 0, fontsize=8
    )
    left.set_ylabel("sparsity of the layer (%)")
    left.grid(axis="y", color="0.92", linewidth=0.7)
    save(figure, path, dpi=120)


def _overlap(figure: Any, axes: Any, masks: Sequence[Tensor]) -> None:
    """Draws the intersection over union of every two masks as a matrix."""
    overlap = np.eye(len(masks))
    for (i, a), (j, b) in itertools.combinations(enumerate(masks), 2):
        overlap[i, j] = overlap[j, i] = float((a & b).sum() / (a | b).sum())
    image = axes.imshow(overlap, cmap="Blues", vmin=0, vmax=max(0.2, *overlap[overlap < 1]))
    figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_xticks(range(len(masks)))
    axes.set_yticks(range(len(masks)))
    density = float(masks[0].float().mean())
    axes.set_title(f"overlap of masks (by chance {density / (2 - density):.2%})", fontsize=10)
