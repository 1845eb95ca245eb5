r"""Secondary objectives: what a network moves towards while the anchors hold its function.

A secondary objective is any callable without arguments that returns a scalar tensor with a graph to the model's
parameters. The optimizer takes its gradient, :math:`b = \nabla L(w)`, and a smaller value is better. An objective of
your own is a function::

    def shrink() -> Tensor:
        return sum(p.square().sum() for p in model.parameters())

    opt = FIPOptimizer(model.parameters(), anchors, secondary=shrink)

or a class with a ``__call__``, if it has to remember something between steps. No base class and no registration is
needed. A sum of objectives is a function too: ``lambda: task() + 0.1 * sparse()``.

Four objectives are here: the loss of a new task, the distance to a sparse and to a quantized network, and the likeness
to other networks.
"""

from fipoptim.secondary.diversity import Diversity
from fipoptim.secondary.grid import OnGrid
from fipoptim.secondary.quantized import QuantizedProjection
from fipoptim.secondary.sparse import SparseProjection
from fipoptim.secondary.task import TaskLoss

__all__ = ["Diversity", "OnGrid", "QuantizedProjection", "SparseProjection", "TaskLoss"]
