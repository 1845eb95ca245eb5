r"""Eq. 4 on the sphere, from a product :math:`v \mapsto g v` alone; nothing about networks.

The step is the minimiser of :math:`v^\top g v + c^\top v` over :math:`\|v\|_P = \varepsilon`. The metric ``g`` is
symmetric positive semi-definite, ``c`` is the linear term (:math:`\beta b`, plus :math:`2 J^\top r / N` with drift
correction), and ``P`` is the preconditioner. In the coordinates :math:`y = R v`, with :math:`P = R^\top R`, the sphere
is Euclidean. A Krylov space of :math:`R^{-\top} g R^{-1}` then reduces the problem to a small one of the same form,
which is solved to machine precision. With the multiplier :math:`\mu`, the solution satisfies
:math:`2 (g + \mu P) v + c = 0` and :math:`\mu \ge -\lambda_{\min}` (Conn, Gould, Toint, *Trust-Region Methods*, 2000,
chapters 5 and 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fipoptim.solver.krylov import KrylovSpace, MatVec
from fipoptim.solver.preconditioner import Preconditioner
from fipoptim.solver.small_problem import SmallSolution, small_problem
from fipoptim.solver.space import WHOLE, Space


@dataclass(frozen=True)
class SphereSolution:
    r"""A solution of Eq. 4, with what is needed to trust it.

    Attributes:
        step: The vector v, shape ``(n,)``.
        multiplier: The Lagrange multiplier :math:`\mu` of the sphere.
        change: The predicted change of the outputs, :math:`\sqrt{v^\top g v}`.
        products: The number of products taken.
        residual: :math:`\|2(g + \mu P)v + c\|_{P^{-1}} / \|c\|_{P^{-1}}`, or relative to
            :math:`2 \lambda_{\max} \varepsilon` if ``c = 0``. None for a step led ``onward``, and for a step whose last
            product was a quadratic form: to know the residual would take (half) a product more.
    """

    step: Tensor
    multiplier: float
    change: float
    products: int
    residual: float | None

    def shortened(self, factor: float) -> SphereSolution:
        """The same step, ``factor`` times as long."""
        if factor == 1.0:
            return self
        return replace(self, step=self.step * factor, change=self.change * factor)

    def within(self, radius: float | None) -> SphereSolution:
        """The step, shortened if it changes the outputs by more than ``radius``; a step that is not finite is left."""
        if radius is not None and radius < self.change < math.inf:
            return self.shortened(radius / self.change)
        return self


class _Coordinates:
    r"""The coordinates :math:`y = R v` with :math:`P = R^\top R`, in which the sphere is Euclidean."""

    def __init__(self, preconditioner: Preconditioner | None, like: Tensor) -> None:
        self._preconditioner = preconditioner
        self._buffer = None if preconditioner is None else torch.empty_like(like)

    def step_of(self, y: Tensor) -> Tensor:
        """The step :math:`R^{-1} y`."""
        return y if self._preconditioner is None else self._preconditioner.inverse_root(y)

    def of_step(self, v: Tensor) -> Tensor:
        """The coordinates :math:`R v` of a step."""
        return v if self._preconditioner is None else self._preconditioner.root(v)

    def of_gradient(self, c: Tensor) -> Tensor:
        r"""The coordinates :math:`R^{-\top} c` of a gradient."""
        return (
            c if self._preconditioner is None else self._preconditioner.transposed_inverse_root(c)
        )

    def product(self, matvec: MatVec, y: Tensor) -> Tensor:
        r""":math:`R^{-\top} g R^{-1} y`."""
        if self._preconditioner is None:
            return matvec(y)
        result = matvec(self._preconditioner.inverse_root(y, self._buffer))
        return self._preconditioner.transposed_inverse_root(result, result)

    def quadratic(self, quadratic: Callable[[Tensor], float], y: Tensor) -> float:
        """:math:`v^T g v` of the step v that ``y`` stands for."""
        if self._preconditioner is None:
            return quadratic(y)
        return quadratic(self._preconditioner.inverse_root(y, self._buffer))


def solve_on_sphere(
    matvec: MatVec,
    linear: Tensor,
    length: float,
    *,
    preconditioner: Preconditioner | None = None,
    direction: Callable[[], Tensor] | None = None,
    max_products: int = 16,
    tol: float = 1e-6,
    accept: Callable[[float, float], bool] | None = None,
    quadratic: Callable[[Tensor], float] | None = None,
    onward: bool = False,
    space: Space = WHOLE,
) -> SphereSolution:
    r"""Minimise :math:`v^\top g v + c^\top v` subject to :math:`\|v\|_P = \varepsilon`.

    Args:
        matvec: The product with ``g``; vectors have shape ``(n,)``. Its result is written to.
        linear: The linear term ``c``, shape ``(n,)``.
        length: The radius :math:`\varepsilon` of the sphere.
        preconditioner: ``P``; None is the identity.
        direction: Gives the direction of the step in the hard case, in which ``c`` alone does not fill the sphere
            (``c = 0``, or ``c`` in the range of ``g`` and small). It is called only then. The step takes the part of
            this direction that changes the outputs least. With None the step stays inside the ball.
        max_products: The most products to take.
        tol: The relative KKT residual at which to stop.
        accept: Stop as soon as ``accept(change, multiplier)`` holds, from the second product on.
        quadratic: :math:`v \mapsto v^\top g v`, at about half the price of a product. The last product that
            ``max_products`` allows is replaced by it, as the step needs no more; the residual is then not known.
        onward: The path goes on without an objective (L = 0), and ``c`` only restores the outputs of earlier steps. In
            a space without null directions the best step would be the way back. So, until the products span the whole
            space, the direction of least change stands in for a direction of no change: the step follows it to the
            side of ``direction``, and ``c`` acts on the other directions.
        space: The space of the vectors, which may be divided among ranks.

    Returns:
        The solution: exact once the Krylov space is exhausted, and before that the best in the space. A multiplier
        below zero is right only if it belongs to the least eigenvalue of ``g``. If products are left, a random start
        then looks for lower eigenvalues that neither ``c`` nor ``direction`` has a part in.

    Raises:
        RuntimeError: If ``linear`` or a product is not finite.
    """
    coordinates = _Coordinates(preconditioner, linear)
    c, c_norm = _scaled(linear, coordinates, space)
    n = space.size(linear)
    capacity = min(max_products, n)
    krylov = KrylovSpace(
        lambda y: coordinates.product(matvec, y),
        capacity,
        # If the space can hold all n directions, only the residual is left to say how good the solution is.
        (lambda y: coordinates.quadratic(quadratic, y))
        if quadratic is not None and max_products < n
        else None,
        space=space,
    )
    rounding = torch.finfo(linear.dtype).eps
    fill: Tensor | None = None  # the coordinates of the direction, once it is needed

    def use_direction() -> None:
        nonlocal fill
        if direction is not None:
            fill = coordinates.of_step(direction())
            krylov.add_start(fill)

    if c_norm > 0:
        krylov.add_start(c)
    else:
        use_direction()
    del c  # as large as the weights, and now in the basis
    searched_to: int | None = None  # the size up to which lower eigenvalues are looked for
    solution = SmallSolution(torch.zeros(0, dtype=torch.float64, device="cpu"), 0.0, 0.0)
    residual: float | None = 0.0
    while True:
        grown = krylov.extend(newest=searched_to is not None)
        # In a whole space the products span all that they can: the solution in the space is the solution.
        whole = krylov.size == n or (not grown and krylov.size < max_products)
        if grown or (whole and onward and krylov.size > 0):
            # The first basis vector is c, unless c is zero; the others are orthogonal to it.
            start = torch.zeros(krylov.size, dtype=torch.float64, device="cpu")
            start[0] = c_norm
            toward = None if fill is None else krylov.coordinates(fill)
            solution = small_problem(
                krylov.T,
                start,
                length,
                toward,
                inside=direction is None,
                onward=onward and not whole,
                rounding=rounding,
            )
            denominator = c_norm if c_norm > 0 else 2 * solution.largest * length
            outside = 2 * krylov.residual(solution.h)
            residual = outside / denominator if denominator > 0 else 0.0
            residual = None if krylov.closed or solution.stands_in else residual
        converged = residual is not None and residual <= tol and krylov.size >= (searched_to or 0)
        if converged and searched_to is not None:
            converged = krylov.lowest()[1] <= tol * solution.largest
        # If the space of c alone leaves part of the sphere open, the given direction fills it, as soon as that space is
        # exhausted, or its solution has converged, or half of the products are spent.
        explored = not grown or converged or 2 * krylov.size >= max_products
        open_ended = solution.hard or solution.multiplier < 0 or (onward and not whole)
        if open_ended and explored and fill is None and direction is not None:
            use_direction()
            continue
        unsure = krylov.size == 0 or solution.multiplier < -solution.noise
        room = krylov.size < capacity and (not grown or converged)
        if unsure and room and searched_to is None and direction:
            # This many products were enough for the eigenvalues found so far; a random start gets as many.
            searched_to = 2 * krylov.size
            seeded = torch.Generator("cpu").manual_seed(0)
            krylov.add_start(space.random(linear, seeded))
            continue
        if not grown or converged:
            break
        if accept is not None and krylov.size >= 2 and accept(solution.change, solution.multiplier):
            break
    if krylov.size == 0:
        return SphereSolution(torch.zeros_like(linear), 0.0, 0.0, 0, 0.0)
    v = coordinates.step_of(krylov.combine(solution.h))
    return SphereSolution(v, solution.multiplier, solution.change, krylov.size, residual)


def _scaled(linear: Tensor, coordinates: _Coordinates, space: Space) -> tuple[Tensor, float]:
    """The coordinates of the linear term up to a factor, and their length.

    Raises:
        RuntimeError: If the length is not finite.
    """
    c = coordinates.of_gradient(linear)
    length = space.norm(c)
    if not 1e-30 < length < 1e30:
        # The coordinates may overflow or underflow; those of the unit vector do not.
        c, size = space.unit(linear)
        c = coordinates.of_gradient(c)
        length = size * space.norm(c)
    if not math.isfinite(length):
        raise RuntimeError("linear: the gradient of the step's problem is not finite.")
    return c, length
