"""Secondary objectives for :class:`fipoptim.FIPOptimizer`."""

from fipoptim.secondary.objectives import Diversity, SparseProjection, TaskLoss

__all__ = ["Diversity", "SparseProjection", "TaskLoss"]
