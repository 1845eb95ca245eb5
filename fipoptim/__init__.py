"""Move trained networks along functionally invariant paths, with the interface of ``torch.optim``."""

from fipoptim import secondary
from fipoptim.anchors.batch import AnchorBatch
from fipoptim.metric.metric import AnchorMetric
from fipoptim.optimizer import FIPOptimizer, StepInfo
from fipoptim.path.record import FIPPath
from fipoptim.solver.sphere import Solver

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
