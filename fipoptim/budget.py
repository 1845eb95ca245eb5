"""The promise of ``max_drift``: a step is shortened, or the function restored behind it, until the drift is within."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.output_space import squared_distance
from fipoptim.mean import AnchorMean
from fipoptim.metric.metric import AnchorMetric
from fipoptim.parameters import displace
from fipoptim.solver.preconditioner import Preconditioner
from fipoptim.solver.sphere import solve_on_sphere

# The fractions of a step that are tried before the function is restored behind the step.
FRACTIONS = (1.0, 0.5)
# The most restoring steps behind one step of the optimizer, and the most halvings of each.
RESTORING_STEPS = 4

_ADVICE = (
    "Did something else change the network (batch norm statistics in train mode, another optimizer)? "
    "Put batch norm in eval mode, raise max_drift, or refresh() the anchors."
)


def check_unmoved(max_drift: float, anchors: AnchorBatch) -> None:
    """Hold the promise in a step that moves no weight.

    Raises:
        RuntimeError: If the drift on all anchors is more than ``max_drift``.
    """
    drift = anchors.drift()
    if not drift <= max_drift:
        raise RuntimeError(
            f"max_drift: the drift is {drift:.6g}, beyond {max_drift:.6g}, and this step moves no weight that could "
            f"restore the function (no gradient, or every lr is 0). {_ADVICE}"
        )


@dataclass(frozen=True)
class WithinBudget:
    """The end of a step that was held within the budget.

    Attributes:
        fraction: The fraction of the step that was taken.
        backtracks: The number of trials that were given up.
        drift: The drift on all anchors.
        outputs: The outputs of all anchors, shape ``(N, m)``.
    """

    fraction: float
    backtracks: int
    drift: float
    outputs: Tensor


class DriftBudget:
    """Keeps the drift on all anchors within a bound.

    Args:
        max_drift: The bound.
        anchors: The anchors, all of which count.
        params: The parameters, which are moved in place.
        metric_of_all: Makes the metric of all anchors at today's weights.
        preconditioner: ``P`` of a restoring step; None is the identity.
        length: The length of a restoring step, at most.
        max_products: The number of products of a restoring step, at most.
    """

    def __init__(
        self,
        max_drift: float,
        anchors: AnchorBatch,
        params: list[Tensor],
        metric_of_all: Callable[[], AnchorMetric],
        *,
        preconditioner: Preconditioner | None,
        length: float,
        max_products: int,
    ) -> None:
        self._max_drift, self._anchors, self._params = max_drift, anchors, params
        self._metric_of_all = metric_of_all
        self._preconditioner, self._length = preconditioner, length
        self._max_products = max_products
        self._outputs: Tensor  # of all anchors, at the last measurement

    def hold(self, start: list[Tensor], step: list[Tensor], outputs: Tensor | None) -> WithinBudget:
        """Move the parameters from ``start`` by as much of ``step`` as the budget allows.

        Args:
            start: The parameters' values before the step.
            step: The whole step, one tensor a parameter.
            outputs: The outputs of all anchors after the whole step, ``(N, m)``, if they are known.

        Raises:
            RuntimeError: If neither a fraction of the step nor the start can be brought within the budget. The
                parameters are then somewhere on the way.
        """
        drifts: dict[float, float] = {}
        for backtracks, fraction in enumerate(FRACTIONS):
            displace(self._params, start, step, fraction)
            drifts[fraction] = self._drift(outputs if fraction == 1.0 else None)
            if drifts[fraction] <= self._max_drift:
                return WithinBudget(fraction, backtracks, drifts[fraction], self._outputs)
        backtracks = len(FRACTIONS)
        # At the edge of the budget the step is taken and the function restored behind it. That leaves the step's part
        # along the surface of equal function. The last resort is to restore the function from the start, which makes
        # room for the next step.
        for fraction in (*FRACTIONS, 0.0):
            displace(self._params, start, step, fraction)
            drift = drifts[fraction] if fraction > 0 else self._drift()
            for _ in range(RESTORING_STEPS):
                if not math.isfinite(drift):
                    break
                before = drift
                drift, tried = self._restore(before)
                backtracks += tried
                if drift <= self._max_drift:
                    return WithinBudget(fraction, backtracks, drift, self._outputs)
                if drift >= before:
                    break
        raise RuntimeError(
            f"max_drift: the drift is {drift:.6g} and cannot be brought below {self._max_drift:.6g} by moving the "
            f"weights; they were put back. {_ADVICE}"
        )

    def _restore(self, before: float) -> tuple[float, int]:
        """Take one damped Gauss-Newton step on the drift of all anchors.

        Returns:
            The drift after the step, and the number of trials that were given up.
        """
        if before == 0.0:
            return before, 0
        metric = self._metric_of_all()
        linear = metric.vjp(metric.mean.squared_gradient(metric.residual()))
        v = solve_on_sphere(
            metric.matvec,
            linear,
            self._length,
            preconditioner=self._preconditioner,
            max_products=self._max_products,
        ).step
        start = [p.clone() for p in self._params]
        for failed in range(RESTORING_STEPS):
            displace(self._params, start, metric.unflatten(v), 0.5**failed)
            drift = self._drift()
            if drift < before:
                return drift, failed
        displace(self._params, start)
        return before, RESTORING_STEPS

    def _drift(self, outputs: Tensor | None = None) -> float:
        """The drift at today's parameters; ``outputs`` are those of all anchors, if they are known."""
        self._outputs = self._anchors.outputs(self._anchors.inputs) if outputs is None else outputs
        distances = squared_distance(self._outputs, self._anchors.reference)
        return float(AnchorMean(len(distances)).of(distances))
