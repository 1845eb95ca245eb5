"""The networks that a run has visited."""

from fipoptim.path.record import FIPPath

__all__ = ["FIPPath"]
