"""Eq. 4 from products with the metric alone; nothing about networks."""

from fipoptim.solver.preconditioner import Preconditioner
from fipoptim.solver.settings import Solver

__all__ = ["Preconditioner", "Solver"]
