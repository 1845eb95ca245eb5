r"""One step of Eq. 4: the linear term, and the step that minimises :math:`v^\top g v + c^\top v`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from fipoptim.anchors.draws import seed_of_step
from fipoptim.metric.metric import AnchorMetric
from fipoptim.shards import part_of
from fipoptim.solver.first_order import first_order_step
from fipoptim.solver.preconditioner import Preconditioner
from fipoptim.solver.settings import Solver
from fipoptim.solver.space import Space
from fipoptim.solver.sphere import SphereSolution, solve_on_sphere
from fipoptim.state import StepState
from fipoptim.step_info import first_order_multiplier


@dataclass(frozen=True)
class Step:
    r"""A step that has been found and not yet taken.

    Attributes:
        solution: The vector and what is known of it.
        outputs: The outputs ``(N, m)`` that the step leads to on its anchors; None if they have not been evaluated.
        unmeasured: The gain :math:`-c^\top v` and the length :math:`\varepsilon` of a step without products whose
            effect nobody has asked for; its ``solution`` then knows neither multiplier nor change. None otherwise.
    """

    solution: SphereSolution
    outputs: Tensor | None
    unmeasured: tuple[float, float] | None = None


def drift_gradient(metric: AnchorMetric) -> Tensor | None:
    r"""The gradient of the drift, :math:`\frac2N J^\top r`, flat, shape ``(n,)``; None if there is no drift."""
    residual = metric.residual()
    if not metric.anchors.ranks.any(bool(residual.any())):
        return None
    return metric.vjp(metric.mean.squared_gradient(residual))


def linear_term(
    metric: AnchorMetric,
    gradients: list[Tensor] | None,
    betas: Sequence[float],
    pull: Tensor | None,
) -> Tensor:
    r""":math:`c = \beta b + \frac2N J^\top r`, flat, shape ``(n,)``.

    Args:
        metric: The metric at today's weights.
        gradients: The gradient ``b``, one tensor a parameter; None for L = 0.
        betas: The weight :math:`\beta` of each parameter.
        pull: The gradient of the drift, which is written to; None if there is none.
    """
    if gradients is None:
        return metric.flat.zeros() if pull is None else pull
    if len(set(betas)) > 1:
        gradients, betas = list(torch._foreach_mul(gradients, betas)), [1.0]
    if pull is None:
        return metric.flatten(gradients).mul_(betas[0])
    gradients = [g.to(pull.device) for g in gradients]
    torch._foreach_add_(metric.views(pull), gradients, alpha=betas[0])
    return pull


def finite_size(metric: AnchorMetric, linear: Tensor, gradients: list[Tensor] | None) -> float:
    """The length of the linear term, which is the same on all ranks.

    Raises:
        RuntimeError: If it is not finite, with the cause, or if it differs between the ranks.
    """
    size, ranks = metric.space.norm(linear), metric.anchors.ranks
    if not ranks.agree(size):
        raise RuntimeError(
            f"gradient: it differs between the ranks (with the restoring term its length is {size:.6g} on rank "
            f"{ranks.rank}); no weight was changed. Wrap the model in DistributedDataParallel, call the wrapper for "
            "the loss, and step only where gradients are synchronized."
        )
    if math.isfinite(size):
        return size
    if gradients is not None and not math.isfinite(total_size(gradients, metric.space)):
        raise RuntimeError(
            "gradient: holds NaN or infinite values; no weight was changed. "
            "Skip such batches or lower the learning rate."
        )
    raise RuntimeError(
        "gradient: with the restoring term it is not finite; no weight was changed. Lower eps or beta."
    )


def total_size(tensors: list[Tensor], space: Space) -> float:
    """The Euclidean length of all tensors together; NaN or infinite if, and only if, an entry is."""
    result = float(get_total_norm(tensors))
    if not 1e-15 < result < math.inf:
        # The squares may overflow or underflow in float32; they do not in float64.
        result = float(get_total_norm([t.double() for t in tensors]))
    return space.length(result)


def minimise(
    metric: AnchorMetric,
    linear: Tensor,
    length: float,
    preconditioner: Preconditioner | None,
    solver: Solver,
    *,
    radius: float | None,
    gradients: list[Tensor] | None,
    onward: bool,
    outputs_after: Callable[[Tensor], Tensor],
    measured: bool,
    direction: Callable[[], Tensor],
) -> Step:
    r"""The step :math:`v` that minimises :math:`v^\top g v + c^\top v` on :math:`\|v\|_P = \varepsilon`.

    Args:
        metric: The metric at today's weights. It is traced if the step takes products.
        linear: The linear term ``c``, shape ``(n,)``.
        length: The length :math:`\varepsilon` of the step.
        preconditioner: ``P``; None is the identity.
        solver: The settings: whether the step without products is tried, and how many products are allowed.
        radius: How far the step may move the outputs, RMS over anchors; a step that would go further is shortened.
        gradients: The gradient ``b``, one tensor a parameter; None for L = 0. If it is zero, at a minimum of L, the
            step may be shorter than ``length``.
        onward: Whether there is no objective, so that the path goes on in the direction it has.
        outputs_after: The outputs on the step's anchors that a step ``(n,)`` leads to.
        measured: Whether they are wanted in any case. They are evaluated as well if the solver or the radius asks.
        direction: Gives the direction of the hard case.
    """
    if solver.tries_first_order:
        measured = measured or solver.adaptive or radius is not None
        after = outputs_after if measured else None
        step = _first_order(metric, linear, length, preconditioner, solver, radius, after)
        if step is not None:
            return step
    metric.prepare_products()
    # At a minimum of L nothing is gained by a move. Without L the path always goes on in some direction.
    at_minimum = not onward and total_size(gradients or [], metric.space) == 0.0
    solution = solve_on_sphere(
        metric.matvec,
        linear,
        length,
        preconditioner=preconditioner,
        direction=None if at_minimum else direction,
        # To go on takes one product for the direction, and one for what restores the function.
        max_products=max(solver.most_products, 2 if onward else 1),
        tol=solver.tol,
        accept=solver.accepts if solver.adaptive else None,
        quadratic=lambda v: metric.mean.rms(metric.jvp(v)) ** 2,
        onward=onward,
        space=metric.space,
    )
    return Step(solution.within(radius), outputs=None)


def _first_order(
    metric: AnchorMetric,
    linear: Tensor,
    length: float,
    preconditioner: Preconditioner | None,
    solver: Solver,
    radius: float | None,
    outputs_after: Callable[[Tensor], Tensor] | None,
) -> Step | None:
    r"""The step without products if its effect on the outputs is good enough, else None.

    If the solver allows no products, it is good enough. The outputs after the step stand for :math:`J v` as well. They
    are not evaluated if ``outputs_after`` is None.
    """
    v, gain = first_order_step(linear, length, preconditioner, space=metric.space)
    if gain == 0.0 or not math.isfinite(gain):
        return None
    if outputs_after is None:
        unknown = SphereSolution(v, math.nan, math.nan, products=0, residual=None)
        return Step(unknown, None, (gain, length))
    outputs = outputs_after(v)
    change = metric.mean.rms(outputs - metric.outputs)
    multiplier = first_order_multiplier(gain, change, length)
    if solver.adaptive and not solver.accepts(change, multiplier):
        return None
    whole = SphereSolution(v, multiplier, change, products=0, residual=None)
    solution = whole.within(radius)
    return Step(solution, outputs if solution is whole else outputs_after(solution.step))


def direction_onward(metric: AnchorMetric, state: StepState, seed: int, count: int) -> Tensor:
    """The direction of the hard case, flat: the velocity of the last step, or a random direction at the start.

    Args:
        metric: The metric at today's weights.
        state: The state of the metric's parameters.
        seed: The run's seed.
        count: The number of steps taken so far.
    """
    parts = []
    seeded = torch.Generator("cpu").manual_seed(seed_of_step(seed, count))
    padding = metric.anchors.padding_rows()
    velocities = state.tensors("velocity")
    known = metric.space.any(*(bool(velocity.any()) for velocity in velocities))
    for k, (name, velocity) in enumerate(zip(metric.names, velocities, strict=True)):
        part = part_of(metric.originals[k])
        if not known[k]:
            drawn = torch.randn(part.shape, generator=seeded, dtype=torch.float64, device="cpu")
            velocity = part.of(drawn).to(velocity)
        if name in padding:
            # No output depends on a padding row, so Eq. 4 does not say how it should move.
            rows = torch.tensor(part.rows(padding[name]), dtype=torch.long, device=velocity.device)
            velocity = velocity.index_fill(0, rows, 0.0)
        parts.append(velocity)
    return metric.without_frozen(metric.flatten(parts))
