"""The figures that only ``recipes.new_task`` draws: accuracies and drift along the way, and a run in its budget."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from recipes.common.figures import plain, save
from recipes.continual.figures import FIRST, SECOND
from recipes.continual.methods import METHODS
from recipes.new_task.outcome import Curve

_COLOURS = ("#1f5fa8", "#d9730d", "0.45", "#4c9150", "#8c5aa8")


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
        for name, values, style in ((task1, curve.task1, FIRST), (task2, curve.task2, SECOND)):
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
            plain(axis)
            _steps(axis, max(c.steps[-1] for c in found.values()))
    axes[0, 0].set_ylim(-3, 103)
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylabel("drift on anchors")
    figure.suptitle(f"{task1}, then {task2}", fontsize=12)
    save(figure, path)


def budget(
    path: Path, found: Mapping[str, Curve], *, max_flips: float, task1: str, task2: str
) -> None:
    """What each method has learnt and which share of the old predictions it has changed, with the budget as a line."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.2, 6.4), sharex=True, layout="constrained"
    )
    for (method, curve), colour in zip(found.items(), itertools.cycle(_COLOURS), strict=False):
        # A method may take more steps than another: all are drawn from start to end.
        along = [100 * step / curve.steps[-1] for step in curve.steps]
        title, own = METHODS[method].title, method == "fip"
        style: dict[str, Any] = {
            "color": colour,
            "linewidth": 2.0 if own else 1.2,
            "zorder": 3 if own else 2,
        }
        top.plot(along, curve.task2, "-", label=f"{title}: {curve.task2[-1]:.1f} %", **style)
        flips = [100 * share for share in curve.flips]
        bottom.plot(along, flips, "-", label=f"{title}: {flips[-1]:.2f} %", **style)
        if own:
            counted = [100 * share for share in curve.counted if share is not None]
            label = f"{title}, check inputs, settled: {counted[-1]:.2f} %"
            bottom.plot(along, counted, ":", label=label, **style)
    label = f"budget on check inputs: {100 * max_flips:g} %"
    bottom.axhline(100 * max_flips, color="black", linewidth=1.0, linestyle="--", label=label)
    # Shares within a budget are small, and plain training changes everything.
    bottom.set_yscale("symlog", linthresh=200 * max_flips or 1.0, linscale=1.5)
    bottom.set_ylim(0, 130)
    bottom.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    top.set_ylim(-3, 103)
    top.set_ylabel(f"{task2}: test accuracy (%)")
    bottom.set_ylabel(f"{task1}: predictions changed (%)")
    bottom.set_xlabel(f"share of the steps on {task2} (%)")
    for axis in (top, bottom):
        plain(axis)
        axis.legend(loc="center right", fontsize=9)
    save(figure, path)


def _steps(axes: Axes, last: int) -> None:
    # Most damage is done in the first steps, so these get as much room as all others.
    axes.set_xscale("symlog", linthresh=10, linscale=1.0)
    axes.set_xlim(-0.3, last * 1.08)
    ticks = [0, 5, 10, *(10**k * m for k in range(1, 7) for m in (3, 10))]
    axes.set_xticks([t for t in ticks if t <= last])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.minorticks_off()
