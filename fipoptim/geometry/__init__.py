"""The norm in which the length of a step is measured, found by name.

A new geometry is a subclass of :class:`Geometry` (or of :class:`DiagonalGeometry`) and one line that registers it:
``register("mine", Mine)``. Then ``FIPOptimizer(..., precondition="mine")`` takes it.
"""

from __future__ import annotations

from typing import Any, Protocol

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.geometry.adam import Adam
from fipoptim.geometry.base import DiagonalGeometry, Geometry
from fipoptim.geometry.euclidean import Euclidean
from fipoptim.geometry.layers import other_than_matrices
from fipoptim.geometry.muon import Muon
from fipoptim.metric.parameters import parameter_names
from fipoptim.parameters import StepParameters

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


class _Optimizer(Protocol):
    """What is read of a :class:`fipoptim.FIPOptimizer`."""

    anchors: AnchorBatch
    param_groups: list[dict[str, Any]]
    precondition: str | None


def describe(optimizer: _Optimizer) -> dict[str, str]:
    """What each parameter is measured by in the geometry of an optimizer, by its name in the model.

    Args:
        optimizer: A :class:`fipoptim.FIPOptimizer`.

    Returns:
        For each parameter ``"matrix"`` (Muon's geometry), ``"squares"`` (Adam's, and Muon's where a parameter is no
        matrix), ``"euclidean"``, or what another geometry calls it.

    Example:
        >>> for name, kind in fipoptim.geometry.describe(opt).items():
        ...     print(f"{kind:10} {name}")
    """
    model, geometry = optimizer.anchors.model, GEOMETRIES[optimizer.precondition]
    every = StepParameters.of_groups(optimizer.param_groups, lambda g, p: True)
    every = every.but_for(other_than_matrices(model))
    names = parameter_names(model, every.originals)
    return {
        name: geometry.kind(p, matrix)
        for name, p, matrix in zip(names, every.originals, every.matrix, strict=True)
    }


__all__ = ["GEOMETRIES", "DiagonalGeometry", "Geometry", "describe", "register"]
