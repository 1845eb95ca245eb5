"""The trade-off: what was learnt against what has moved."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from recipes.common.figures import plain, save
from recipes.common.report import means
from recipes.finetune.tables import Records, of_choices

MARKERS = "Dos^vPX<>"


def trade_off(path: Path, records: Records) -> None:
    """Draws accuracy and NLL of every network against its drift, means over seeds.

    Args:
        path: The PNG file.
        records: The records of each method's runs, one a seed.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    for number, runs in enumerate(records.values()):
        points = [
            means([{key: float(p[key]) for key in ("drift", "nll", "accuracy")} for p in choice])
            for choice in of_choices(runs)
        ]
        points = [p for p in points if p["drift"] > 0]  # the axis is logarithmic
        for axis, key in zip(axes, ("nll", "accuracy"), strict=True):
            axis.plot(
                [p["drift"] for p in points],
                [p[key] for p in points],
                MARKERS[number % len(MARKERS)],
                color=f"C{number}",
                label=runs[0]["title"],
                ms=5,
            )
    for axis, label in zip(
        axes, ("NLL of new examples (nats)", "new examples right (%)"), strict=True
    ):
        plain(axis)
        axis.set_xscale("log")
        axis.set_xlabel("drift on held-out inputs")
        axis.set_ylabel(label)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, path)
