"""The figure of ``recipes.update``: what an update costs in negative flips, and what it knows for that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from recipes.common.figures import plain, save
from recipes.update import tables
from recipes.update.methods import METHODS

_COLOURS = ("#1f5fa8", "#d9730d", "#b03a5b", "#4c9150", "#7a5ea8", "0.5")
_MARKERS = "osv^Dx"
_KNOWN = (("accuracy", "test accuracy, all classes (%)"), ("accuracy_new", "new classes (%)"))


def trade_off(path: Path, records: tables.Records) -> None:
    """Draws accuracy against negative flips: a point for each network and seed, and a line through the means.

    Args:
        path: The file.
        records: The records of each method's runs, one a seed.
    """
    figure, both = plt.subplots(1, 2, figsize=(9.0, 4.0), layout="constrained")
    for axes, (key, label) in zip(both, _KNOWN, strict=True):
        for method, runs in records.items():
            _draw(axes, method, key, runs)
        axes.set_xlabel("right before and wrong now (% of the old classes' test inputs)")
        axes.set_ylabel(label)
        plain(axes)
    both[0].legend(frameon=False, fontsize=9)
    save(figure, path)


def _draw(axes: Axes, method: str, key: str, runs: Sequence[tables.Record]) -> None:
    k = list(METHODS).index(method)  # a method looks the same whichever others are drawn
    colour, marker = _COLOURS[k % len(_COLOURS)], _MARKERS[k % len(_MARKERS)]
    across, up = [], []
    for networks in zip(*(run["networks"] for run in runs), strict=True):
        flips, known = ([float(n[name]) for n in networks] for name in ("negative_flip_rate", key))
        axes.scatter(flips, known, s=12, color=colour, marker=marker, alpha=0.5)
        across.append(fmean(flips))
        up.append(fmean(known))
    axes.plot(
        across, up, color=colour, marker=marker, markersize=6, linewidth=1.2, label=runs[0]["title"]
    )
