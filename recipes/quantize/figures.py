"""The figure of ``recipes.quantize``: accuracy against bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from recipes.common.figures import plain, save
from recipes.quantize.methods import METHODS

_COLOURS = ("#1f5fa8", "#d9730d", "#4c9150", "0.5", "#b03a5b", "#7a5ea8")
_MARKERS = "osv^Dx"


def accuracies(path: Path, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draws accuracy against bits for all methods: means over seeds and standard deviations.

    Args:
        path: The file.
        records: The records of each method's runs, one a seed.
    """
    figure, axes = plt.subplots(figsize=(6.0, 4.0), layout="constrained")
    for method, runs in records.items():
        k = list(METHODS).index(method)  # a method looks the same whichever others are drawn
        bits = [n["bits"] for n in runs[0]["networks"]]
        found = np.array([[n["accuracy"] for n in run["networks"]] for run in runs])
        axes.errorbar(
            range(len(bits)),
            found.mean(axis=0),
            found.std(axis=0, ddof=1) if len(runs) > 1 else None,
            label=runs[0]["title"],
            color=_COLOURS[k % len(_COLOURS)],
            marker=_MARKERS[k % len(_MARKERS)],
            markersize=4,
            linewidth=1.6,
            capsize=2,
        )
        axes.set_xticks(range(len(bits)), [str(b) for b in bits])
    dense = np.mean([run["dense_accuracy"] for runs in records.values() for run in runs])
    axes.axhline(dense, color="0.4", linewidth=0.8, linestyle=":", label="dense network")
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("test accuracy (%)")
    plain(axes)
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    save(figure, path)
