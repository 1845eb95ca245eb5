"""The promise of ``max_drift``: a step is shortened, or the function restored behind it, until the drift is within."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.output_space import squared_distance
from fipoptim.geometry.base import Geometry
from fipoptim.metric.chunks import Form
from fipoptim.metric.metric import AnchorMetric
from fipoptim.solver.sphere import solve_on_sphere

# The shares of a step that are tried against the budget before the function is restored behind it.
SHARES = (1.0, 0.5)
# The most steps that restore the function behind one step of the optimizer, and the most halvings of each.
RESTORING_STEPS = 4


WHAT_ELSE = (
    "Did something else change the network (batch norm statistics in train mode, another optimizer)? "
    "Put batch norm in eval mode, raise max_drift, or refresh() the anchors."
)


def check_unmoved(most: float, anchors: AnchorBatch) -> None:
    """Hold the promise in a step in which no weight moves.

    Raises:
        RuntimeError: If the drift on all anchors is more than ``most``.
    """
    drift = anchors.drift()
    if not drift <= most:
        raise RuntimeError(
            f"max_drift: the drift is {drift:.6g}, beyond {most:.6g}, and this step moves no weight that could "
            f"restore the function (no gradient, or every lr is 0). {WHAT_ELSE}"
        )


@dataclass(frozen=True)
class Held:
    """Where a step within the budget ended.

    Attributes:
        kept: The fraction of the step.
        backtracks: The number of trials that were not kept.
        drift: On all anchors.
        outputs: The outputs of all anchors there.
    """

    kept: float
    backtracks: int
    drift: float
    outputs: Tensor


class DriftBudget:
    """Keeps the drift on all anchors within a bound.

    Args:
        most: The bound.
        anchors: All of them count.
        params: The parameters that move, in place.
        form: How the metric's products over them are taken.
        geometry: Of the steps; None is the Euclidean one.
        length: Of a restoring step, at most.
        max_products: Of a restoring step.
        frozen: The masks of weights that do not move, as for AnchorMetric.
        compile: Compile the trace of the derivative.
    """

    def __init__(
        self,
        most: float,
        anchors: AnchorBatch,
        params: list[Tensor],
        form: Form,
        *,
        geometry: Geometry | None,
        length: float,
        max_products: int,
        frozen: Sequence[Tensor] | None,
        compile: bool,
    ) -> None:
        self._frozen, self._compile = frozen, compile
        self._most, self._anchors, self._params, self._form = most, anchors, params, form
        self._geometry, self._length, self._max_products = geometry, length, max_products
        self._outputs: Tensor  # of all anchors, as last measured

    def hold(self, start: list[Tensor], step: list[Tensor], outputs: Tensor | None) -> Held:
        """Moves the parameters from ``start`` by as much of ``step`` as the budget allows.

        Args:
            start: Their values before the step.
            step: The whole step, a tensor a parameter.
            outputs: The outputs of all anchors after the whole step, where they are known.

        Raises:
            RuntimeError: If no share of the step, and not the start either, can be brought within the budget; the
                parameters are then somewhere on the way.
        """
        drifts: dict[float, float] = {}
        for backtracks, kept in enumerate(SHARES):
            displace(self._params, start, step, kept)
            drifts[kept] = self._drift(outputs if kept == 1.0 else None)
            if drifts[kept] <= self._most:
                return Held(kept, backtracks, drifts[kept], self._outputs)
        backtracks = len(SHARES)
        # At the edge of the budget: take the step and restore the function behind it, which leaves its part along
        # the surface of equal function; failing that, restore it from the start, which makes room for the next.
        for kept in (*SHARES, 0.0):
            displace(self._params, start, step, kept)
            drift = drifts[kept] if kept > 0 else self._drift()
            for _ in range(RESTORING_STEPS):
                if not math.isfinite(drift):
                    break
                before = drift
                drift, tried = self._restore(before)
                backtracks += tried
                if drift <= self._most:
                    return Held(kept, backtracks, drift, self._outputs)
                if drift >= before:
                    break
        raise RuntimeError(
            f"max_drift: the drift is {drift:.6g} and cannot be brought below {self._most:.6g} by moving the "
            f"weights; they were put back. {WHAT_ELSE}"
        )

    def _restore(self, before: float) -> tuple[float, int]:
        """One damped Gauss-Newton step on the drift of all anchors; the drift after it, and failed trials."""
        if before == 0.0:
            return before, 0
        params, sample = self._params, self._anchors.all()
        metric = AnchorMetric(
            self._anchors,
            params,
            sample=sample,
            form=self._form,
            compile=self._compile,
            guard=False,
            frozen=self._frozen,
        )
        residual = metric.outputs - sample.reference.to(metric.outputs.device)
        linear = metric.vjp(residual * (2.0 / residual.shape[0]))
        step = solve_on_sphere(
            metric.matvec,
            linear,
            self._length,
            geometry=self._geometry,
            max_products=self._max_products,
        ).step
        start = [p.clone() for p in params]
        for failed in range(RESTORING_STEPS):
            displace(params, start, metric.unflatten(step), 0.5**failed)
            drift = self._drift()
            if drift < before:
                return drift, failed
        displace(params, start)
        return before, RESTORING_STEPS

    def _drift(self, outputs: Tensor | None = None) -> float:
        """The drift where the parameters are now, of ``outputs`` if they are known."""
        self._outputs = self._anchors.outputs(self._anchors.inputs) if outputs is None else outputs
        return float(squared_distance(self._outputs, self._anchors.reference).mean())


def displace(
    params: list[Tensor],
    start: Iterable[Tensor],
    step: list[Tensor] | None = None,
    factor: float = 1.0,
) -> None:
    """Set the parameters to ``start + factor * step``; to ``start``, bit for bit, without a step."""
    torch._foreach_copy_(params, list(start))
    if step is not None and factor > 0:
        torch._foreach_add_(params, step, alpha=factor)
