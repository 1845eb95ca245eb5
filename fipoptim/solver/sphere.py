r"""Eq. 4 on the sphere, from a product :math:`v \mapsto g v` alone; nothing about networks.

The step is the minimiser of :math:`v^\top g v + c^\top v` over :math:`\|v\|_P = \varepsilon`, where ``g`` is symmetric
positive semi-definite, ``c`` the linear term (:math:`\beta b`, and :math:`2 J^\top r / N` with drift correction) and
``P`` the geometry (see ``fipoptim.geometry``). In the coordinates :math:`y = P^{1/2} v` it is Euclidean. There, a
Krylov space of :math:`P^{-1/2} g P^{-1/2}` reduces the problem to a small one with the same form, which is solved to
machine precision. With the multiplier :math:`\mu`, the solution satisfies :math:`2 (g + \mu P) v + c = 0` and
:math:`\mu \ge -\lambda_{\min}` (Conn, Gould, Toint, *Trust-Region Methods*, 2000, chapters 5 and 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fipoptim.geometry.base import Geometry
from fipoptim.solver.krylov import KrylovSpace, MatVec, inner, norm, unit


@dataclass(frozen=True)
class Solver:
    r"""How Eq. 4 is solved.

    Args:
        products: The number of metric products a step: an integer takes exactly so many (fewer on
            convergence), 0 is the first-order step. ``"adaptive"`` tries that one first and keeps it where what it
            would do to the outputs is good enough, and takes up to ``max_products`` where it is not.
        max_products: The most products an adaptive step takes.
        tol: Relative KKT residual at which the solution counts as converged.
        radius: How far a step may move the anchors' outputs (RMS over anchors of :math:`\|\Delta z\|`; measured
            without products, to first order with them). The adaptive solver takes products where the first-order step
            goes further; a step that still does is shortened to it. None lets Eq. 4 decide: to the adaptive solver a
            step is good enough if it does not go past the minimum along its own line.

    Raises:
        ValueError: If a setting is out of range; the message names it.
    """

    products: int | str = "adaptive"
    max_products: int = 16
    tol: float = 1e-6
    radius: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        whole = isinstance(self.products, int) and not isinstance(self.products, bool)
        if not (self.products == "adaptive" or (whole and int(self.products) >= 0)):
            raise ValueError(
                f"products: must be 'adaptive' or an integer >= 0, got {self.products!r}."
            )
        if not isinstance(self.max_products, int) or self.max_products < 1:
            raise ValueError(f"max_products: must be an integer >= 1, got {self.max_products!r}.")
        if not (math.isfinite(self.tol) and self.tol >= 0):
            raise ValueError(f"tol: must be finite and >= 0, got {self.tol!r}.")
        if self.radius is not None and not (math.isfinite(self.radius) and self.radius > 0):
            raise ValueError(f"radius: must be finite and > 0, or None, got {self.radius!r}.")


@dataclass(frozen=True)
class SphereSolution:
    r"""A solution of Eq. 4, with what is needed to trust it.

    Attributes:
        step: The vector v, shape ``(n,)``.
        multiplier: The Lagrange multiplier :math:`\mu` of the sphere.
        change: The predicted change of the outputs, :math:`\sqrt{v^\top g v}`.
        products: The number of products taken.
        residual: :math:`\|2(g + \mu P)v + c\|_{P^{-1}} / \|c\|_{P^{-1}}`, and where ``c = 0`` relative to
            :math:`2 \lambda_{\max} \varepsilon`. None where it is not known, as it takes (half) a product more, and for
            a step led ``onward``.
    """

    step: Tensor
    multiplier: float
    change: float
    products: int
    residual: float | None


def first_order_step(
    linear: Tensor, length: float, geometry: Geometry | None = None
) -> tuple[Tensor, float]:
    r"""The step for ``g = 0``, :math:`v = -\varepsilon P^{-1} c / \|c\|_{P^{-1}}`, and its gain :math:`-c^\top v`.

    Both are zero if ``c`` is.
    """
    if geometry is None:
        direction, size = unit(linear)
        return direction.mul_(-length), length * size
    direction = geometry.inverse(linear)
    square, scale = inner(linear, direction), 1.0
    if not 1e-30 < square < 1e30:
        # Also where float32 overflows or underflows.
        linear, scale = unit(linear)
        direction = geometry.inverse(linear)
        square = inner(linear, direction)
    size = math.sqrt(max(square, 0.0))
    if size == 0.0:
        return direction, 0.0
    return direction.mul_(-length / size), length * scale * size


def solve_on_sphere(
    matvec: MatVec,
    linear: Tensor,
    length: float,
    *,
    geometry: Geometry | None = None,
    direction: Callable[[], Tensor] | None = None,
    max_products: int = 16,
    tol: float = 1e-6,
    accept: Callable[[float, float], bool] | None = None,
    quadratic: Callable[[Tensor], float] | None = None,
    onward: bool = False,
) -> SphereSolution:
    r"""Minimise :math:`v^\top g v + c^\top v` subject to :math:`\|v\|_P = \varepsilon`.

    Args:
        matvec: The product with ``g``; vectors have shape ``(n,)``. What it returns is written to.
        linear: The linear term ``c``, shape ``(n,)``.
        length: The radius :math:`\varepsilon` of the sphere.
        geometry: ``P``; None is the identity.
        direction: Gives, when it is needed, where the step goes when ``c`` alone does not fill the sphere (the
            hard case: ``c = 0``, or ``c`` in the range of ``g`` and small); of it, the part in the directions
            that change the outputs least is taken. None lets the step stay inside the ball then.
        max_products: The most products to take.
        tol: Relative KKT residual at which to stop.
        accept: Stop as soon as ``accept(change, multiplier)`` holds, from the second product on.
        quadratic: :math:`v \mapsto v^\top g v` at about half the price of a product. Of the last product that
            ``max_products`` allows it is all that the step needs; the residual is then not known.
        onward: That ``c`` only restores what earlier steps changed, as for L = 0. The best step in a space that has no
            null directions is then back to where the last one came from. Until the products span all that they can,
            the direction of least change stands for those of no change: it is followed to the side of ``direction``,
            and ``c`` acts on the rest.

    Returns:
        The solution; exact once the Krylov space is exhausted, else the best in it. A multiplier below zero is right
        only if it is that of the least eigenvalue of all: a random start then looks for lower ones that neither ``c``
        nor ``direction`` has a part in, where products are left.

    Raises:
        RuntimeError: If ``linear`` or a product is not finite.
    """
    room = None if geometry is None else torch.empty_like(linear)

    def scaled(v: Tensor, out: Tensor | None = None) -> Tensor:
        return v if geometry is None else geometry.inverse_root(v, out)

    def product(y: Tensor) -> Tensor:
        result = matvec(scaled(y, room))
        return scaled(result, result)

    c = scaled(linear)
    c_norm = norm(c)
    if not 1e-30 < c_norm < 1e30:
        # Also where c in these coordinates overflows or underflows.
        c, size = unit(linear)
        c = scaled(c)
        c_norm = size * norm(c)
    if not math.isfinite(c_norm):
        raise RuntimeError("linear: the gradient of the step's problem is not finite.")
    space = KrylovSpace(
        product,
        min(max_products, linear.numel()),
        # With as many vectors as weights the residual is what is left to say.
        (lambda y: quadratic(scaled(y, room)))
        if quadratic is not None and max_products < linear.numel()
        else None,
    )
    rounding = torch.finfo(linear.dtype).eps
    fill: Tensor | None = None  # the direction, once it is needed

    def use_fill() -> None:
        nonlocal fill
        if direction is not None:
            fill = direction() if geometry is None else geometry.root(direction())
            space.add_start(fill)

    if c_norm > 0:
        space.add_start(c)
    else:
        use_fill()
    del c  # of the size of the weights, and in the basis now
    searched_to: int | None = None  # the size up to which lower eigenvalues are looked for
    solution = _Small(torch.zeros(0, dtype=torch.float64, device="cpu"), 0.0, 0.0)
    residual: float | None = 0.0
    while True:
        grown = space.extend(newest=searched_to is not None)
        # Whether the products span all that they can, so that the solution in the space is the solution.
        whole = space.size == linear.numel() or (not grown and space.size < max_products)
        if grown or (whole and onward and space.size > 0):
            # The basis starts with c, if c is not zero, and is orthogonal to it from there on.
            start = torch.zeros(space.size, dtype=torch.float64, device="cpu")
            start[0] = c_norm
            toward = None if fill is None else space.coordinates(fill)
            solution = small_problem(
                space.T,
                start,
                length,
                toward,
                inside=direction is None,
                onward=onward and not whole,
                rounding=rounding,
            )
            denominator = c_norm if c_norm > 0 else 2 * solution.largest * length
            outside = 2 * space.residual(solution.h)
            residual = outside / denominator if denominator > 0 else 0.0
            residual = None if space.closed or solution.stands_in else residual
        converged = residual is not None and residual <= tol and space.size >= (searched_to or 0)
        # Where the space of c alone would overshoot, the rest of the sphere is filled from the given direction,
        # once that space is known as far as it goes or half the products are spent.
        explored = not grown or converged or 2 * space.size >= max_products
        open_ended = solution.hard or solution.multiplier < 0 or (onward and not whole)
        if open_ended and explored and fill is None and direction is not None:
            use_fill()
            continue
        stuck = space.size == 0 or solution.multiplier < -solution.noise
        left = space.size < min(max_products, linear.numel())
        if stuck and left and (not grown or converged) and searched_to is None and direction:
            # As far as the space went so far, which was far enough for the eigenvalues that it holds.
            searched_to = 2 * space.size
            space.add_start(_random(linear))
            continue
        if not grown or converged:
            break
        if accept is not None and space.size >= 2 and accept(solution.change, solution.multiplier):
            break
    if space.size == 0:
        return SphereSolution(torch.zeros_like(linear), 0.0, 0.0, 0, 0.0)
    y = space.combine(solution.h)
    return SphereSolution(scaled(y), solution.multiplier, solution.change, space.size, residual)


def _random(like: Tensor) -> Tensor:
    """A vector that has a part in every eigenspace, the same at every call."""
    seeded = torch.Generator("cpu").manual_seed(0)
    return torch.randn(like.shape, generator=seeded, dtype=torch.float64, device="cpu").to(like)


@dataclass(frozen=True)
class _Small:
    h: Tensor
    multiplier: float
    change: float
    largest: float = 0.0  # eigenvalue of T
    noise: float = 0.0  # what eigenvalues of T may be off by
    hard: bool = False
    stands_in: bool = False  # the lowest eigenvector, for a null space that is not there


def small_problem(
    T: Tensor,
    linear: Tensor,
    length: float,
    toward: Tensor | None = None,
    *,
    inside: bool = False,
    onward: bool = False,
    rounding: float = 2.0**-52,
) -> _Small:
    r"""Minimise :math:`h^\top T h + a^\top h` over :math:`\|h\| = \varepsilon` to machine precision.

    Args:
        T: Symmetric positive semi-definite up to rounding, shape ``(k, k)``, float64.
        linear: The vector a, shape ``(k,)``.
        length: The radius.
        toward: What fills the sphere in the hard case; None takes any eigenvector.
        inside: Accept a minimiser inside the ball.
        onward: Where T has no null space, or rounding hides that it has none, let its lowest eigenvectors stand in:
            ``linear`` has no say there.
        rounding: Relative error of T and a: differences of eigenvalues below it are none.
    """
    eigenvalues, vectors = torch.linalg.eigh(T)
    # g is positive semi-definite: what is below zero is rounding.
    eigenvalues = eigenvalues.clamp(min=0)
    lowest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    # h_i = -alpha_i / (gap_i + s) in the eigenbasis, with the shift s = mu + lambda_min >= 0.
    alpha = vectors.T @ linear / 2
    gap = eigenvalues - lowest
    noise = 10 * rounding * len(gap)
    null = gap <= noise * largest
    gap[null] = 0.0
    # A component this small is rounding; left in, it would fill the sphere at random.
    alpha[null & (alpha.abs() <= noise * norm(alpha))] = 0.0

    if onward and toward is not None and (lowest > noise * largest or bool(alpha[null].any())):
        return _onward(eigenvalues, vectors, alpha, length, toward, null)

    def coefficients(s: float) -> Tensor:
        return torch.where(alpha == 0, torch.zeros_like(alpha), -alpha / (gap + s))

    if inside:
        # The pseudo-inverse solution, if the ball holds it.
        solvable = (eigenvalues > noise * largest) | (alpha == 0)
        if bool(solvable.all()):
            h = torch.where(alpha == 0, torch.zeros_like(alpha), -alpha / eigenvalues)
            if norm(h) <= length:
                return _Small(vectors @ h, 0.0, _change(eigenvalues, h), largest)
    if norm(coefficients(0.0)) < length:
        # The hard case: the shift is zero and the lowest eigenspace fills the sphere.
        h = _filled(coefficients(0.0), length, vectors, toward, null)
        change = _change(eigenvalues, h)
        return _Small(vectors @ h, -lowest, change, largest, noise * largest, hard=True)
    s = _shift(alpha, gap, length)
    h = coefficients(s)
    h = h * (length / norm(h))
    return _Small(vectors @ h, s - lowest, _change(eigenvalues, h), largest, noise * largest)


def _onward(
    eigenvalues: Tensor, vectors: Tensor, alpha: Tensor, length: float, toward: Tensor, null: Tensor
) -> _Small:
    """The hard case as if the ``null`` eigenvectors, the lowest and its equals, changed nothing: to ``toward``'s side.

    Where rounding hides the lowest eigenvalue it would hide too that ``alpha`` leads back there, and nowhere else.
    """
    h = torch.where(null, torch.zeros_like(alpha), -alpha / eigenvalues)
    # What restores the function takes half of the (squared) step at most, so that it does go on.
    h *= min(1.0, length * math.sqrt(0.5) / max(norm(h), 1e-300))
    h = _filled(h, length, vectors, toward, null)
    change, largest = _change(eigenvalues, h), float(eigenvalues[-1])
    return _Small(vectors @ h, -float(eigenvalues[0]), change, largest, hard=True, stands_in=True)


def _filled(
    h: Tensor, length: float, vectors: Tensor, toward: Tensor | None, null: Tensor
) -> Tensor:
    """``h`` brought to the sphere along the ``null`` eigenvectors, to the side of ``toward``."""
    missing = length * math.sqrt(max(1.0 - (norm(h) / length) ** 2, 0.0))
    filling = (
        torch.where(null, vectors.T @ toward, 0.0) if toward is not None else torch.zeros_like(h)
    )
    size = norm(filling)
    if size == 0.0:
        filling[0], size = 1.0, 1.0
    return h + filling * (missing / size)


def _change(eigenvalues: Tensor, h: Tensor) -> float:
    return math.sqrt(float((eigenvalues * h.square()).sum()))


def _shift(alpha: Tensor, gap: Tensor, length: float) -> float:
    r"""The root ``s > 0`` of :math:`\sum_i \alpha_i^2 / (\delta_i + s)^2 = \varepsilon^2`.

    Newton's iteration on the nearly linear :math:`1/\|h(s)\| - 1/\varepsilon` (Hebden; More and Sorensen), kept inside
    a bracket that bisection shrinks where Newton leaves it.
    """
    alpha = alpha / length  # now the target is 1
    low, high = norm(alpha[gap == 0]), norm(alpha)
    s = low if low > 0 else high * 1e-8
    for _ in range(200):
        shifted = gap + s
        h = alpha / shifted
        size = norm(h)
        if size > 1:
            low = max(low, s)
        else:
            high = min(high, s)
        if abs(size - 1) <= 4e-16 or high <= low * (1 + 4e-16):
            break
        slope = float((h.square() / shifted).sum()) / size**2
        newton = s + (size - 1) / slope
        previous = s
        s = newton if low < newton < high else (math.sqrt(low * high) if low > 0 else high / 16)
        if s == previous:
            break
    return s
