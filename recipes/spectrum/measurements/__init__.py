"""What is measured of the metric: a file each, and a line each in the registry below.

A measurement's file holds its options, its table and its part of the figure. Command line and results read the
registry, so a new measurement is one new file and one call of :func:`register`.
"""

from recipes.spectrum.measurements.layers import Layers
from recipes.spectrum.measurements.measurement import Measurement
from recipes.spectrum.measurements.moves import Moves
from recipes.spectrum.measurements.overlap import Overlap
from recipes.spectrum.measurements.path import AlongPath
from recipes.spectrum.measurements.whole import Whole

MEASUREMENTS: dict[str, Measurement] = {}


def register(name: str, measurement: Measurement) -> None:
    """Adds a measurement under the name that the command line and files know it by.

    Raises:
        ValueError: If there is a measurement of that name.
    """
    if name in MEASUREMENTS:
        raise ValueError(f"name: a measurement {name!r} is registered already.")
    MEASUREMENTS[name] = measurement


register("spectrum", Whole())  # the order of the command line, of the runs and of the tables
register("layers", Layers())
register("moves", Moves())
register("overlap", Overlap())
register("path", AlongPath())
