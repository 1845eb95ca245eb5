"""The networks that a run has visited: recorded, loaded back, combined and drawn."""

from fipoptim.path.ensemble import PathEnsemble
from fipoptim.path.index import PathPoint
from fipoptim.path.record import FIPPath

__all__ = ["FIPPath", "PathEnsemble", "PathPoint"]
