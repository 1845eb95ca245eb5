"""Move trained networks along functionally invariant paths, with the interface of ``torch.optim``."""

from fipoptim import geometry, secondary
from fipoptim.anchors import AnchorBatch
from fipoptim.bounds import inputs_needed
from fipoptim.certificate import BudgetExceeded, Certificate, certify
from fipoptim.metric import AnchorMetric
from fipoptim.optimizer import FIPOptimizer
from fipoptim.path import FIPPath
from fipoptim.restore import restore
from fipoptim.restoring import Restored
from fipoptim.solver import Solver
from fipoptim.step_info import StepInfo

__version__ = "0.1.0"

__all__ = [
    "AnchorBatch",
    "AnchorMetric",
    "BudgetExceeded",
    "Certificate",
    "FIPOptimizer",
    "FIPPath",
    "Restored",
    "Solver",
    "StepInfo",
    "certify",
    "geometry",
    "inputs_needed",
    "restore",
    "secondary",
]
