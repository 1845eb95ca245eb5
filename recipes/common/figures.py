"""What all figures of the recipes share. Importing it chooses a backend that needs no screen."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # figures are files only: a recipe also runs where there is no screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.common.files import replace


def plain(axes: Axes) -> None:
    """A light grid behind the data, and no frame at the top and to the right."""
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path, *, dpi: int = 150) -> None:
    """Writes a figure as PNG, whole or not at all, and closes it."""
    replace(path, lambda temporary: figure.savefig(temporary, dpi=dpi, format="png"))
    plt.close(figure)
