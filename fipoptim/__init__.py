"""Move trained networks along functionally invariant paths, with the interface of ``torch.optim``."""

from fipoptim import secondary
from fipoptim.anchors import AnchorBatch
from fipoptim.metric import AnchorMetric
from fipoptim.optimizer import FIPOptimizer, StepInfo
from fipoptim.path import FIPPath
from fipoptim.subproblem import Solver

__version__ = "0.1.0"

__all__ = [
    "AnchorBatch",
    "AnchorMetric",
    "FIPOptimizer",
    "FIPPath",
    "Solver",
    "StepInfo",
    "secondary",
]
