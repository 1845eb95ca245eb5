"""The figure of ``recipes.spectrum``: a panel for each thing that was measured, of one seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt

from recipes.common.figures import plain, save
from recipes.spectrum.measurements import MEASUREMENTS
from recipes.spectrum.measurements.measurement import Record

COLUMNS = 3


def draw(path: Path, records: Mapping[str, Record]) -> None:
    """Draws the records of one seed.

    Args:
        path: The PNG file.
        records: The record of each measurement.
    """
    panels = [
        (draw, record) for name, record in records.items() for draw in MEASUREMENTS[name].panels()
    ]
    rows = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(12.6, 3.6 * rows), squeeze=False, layout="constrained"
    )
    for k, place in enumerate(axes.flat):
        if k < len(panels):
            plain(place)
            panels[k][0](place, panels[k][1])
        else:
            place.set_axis_off()
    save(figure, path, dpi=70)
