"""The norm in which the length of a step is measured, found by name.

A new geometry is a subclass of :class:`Geometry` (or of :class:`DiagonalGeometry`) and one line that registers it:
``register("mine", Mine)``. Then ``FIPOptimizer(..., precondition="mine")`` takes it.
"""

from __future__ import annotations

from fipoptim.geometry.adam import Adam
from fipoptim.geometry.base import DiagonalGeometry, Geometry
from fipoptim.geometry.euclidean import Euclidean
from fipoptim.geometry.muon import Muon

GEOMETRIES: dict[str | None, type[Geometry]] = {None: Euclidean, "adam": Adam, "muon": Muon}


def register(name: str, geometry: type[Geometry]) -> None:
    """Make ``geometry`` available as ``FIPOptimizer(..., precondition=name)``.

    Raises:
        TypeError: If ``name`` is not a string, or ``geometry`` is not a subclass of :class:`Geometry`.
        ValueError: If another geometry has that name.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: must be a string, got {name!r}.")
    if not (isinstance(geometry, type) and issubclass(geometry, Geometry)):
        raise TypeError(f"geometry: must be a subclass of Geometry, got {geometry!r}.")
    if GEOMETRIES.setdefault(name, geometry) is not geometry:
        raise ValueError(f"name: {name!r} is the name of {GEOMETRIES[name].__name__} already.")


__all__ = ["GEOMETRIES", "DiagonalGeometry", "Geometry", "register"]
