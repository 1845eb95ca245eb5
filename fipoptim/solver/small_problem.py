r"""Eq. 4 in a space of few dimensions: minimise :math:`h^\top T h + a^\top h` over :math:`\|h\| = \varepsilon`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fipoptim.solver.vectors import norm


@dataclass(frozen=True)
class SmallSolution:
    r"""A solution of the small problem.

    Attributes:
        h: The minimiser, shape ``(k,)``, float64.
        multiplier: The Lagrange multiplier :math:`\mu` of the sphere.
        change: :math:`\sqrt{h^\top T h}`.
        largest: The largest eigenvalue of T.
        noise: The error that eigenvalues of T may have by rounding.
        hard: Whether it is the hard case: ``a`` alone does not fill the sphere, and the lowest eigenvectors do.
        stands_in: Whether the lowest eigenvectors stand in for a null space that T does not have.
    """

    h: Tensor
    multiplier: float
    change: float
    largest: float = 0.0
    noise: float = 0.0
    hard: bool = False
    stands_in: bool = False


def small_problem(
    T: Tensor,
    linear: Tensor,
    length: float,
    toward: Tensor | None = None,
    *,
    inside: bool = False,
    onward: bool = False,
    rounding: float = 2.0**-52,
) -> SmallSolution:
    r"""Minimise :math:`h^\top T h + a^\top h` over :math:`\|h\| = \varepsilon` to machine precision.

    Args:
        T: The matrix, shape ``(k, k)``, float64: symmetric and, up to rounding, positive semi-definite.
        linear: The vector a, shape ``(k,)``.
        length: The radius :math:`\varepsilon`.
        toward: The direction that fills the sphere in the hard case, shape ``(k,)``; None takes any eigenvector of the
            lowest eigenvalue.
        inside: Accept a minimiser inside the ball.
        onward: If T has no null space, or if rounding hides whether it has one, let the lowest eigenvectors stand in
            for it: ``linear`` does not act on them.
        rounding: The relative error of T and a. Eigenvalues that differ by less count as equal.
    """
    eigenvalues, vectors = torch.linalg.eigh(T)
    # T is positive semi-definite: an eigenvalue below zero is rounding.
    eigenvalues = eigenvalues.clamp(min=0)
    lowest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    # In the eigenbasis h_i = -alpha_i / (gap_i + s), with the shift s = mu + lambda_min >= 0.
    alpha = vectors.T @ linear / 2
    gap = eigenvalues - lowest
    noise = 10 * rounding * len(gap)
    null = gap <= noise * largest
    gap[null] = 0.0
    # A component this small is rounding. It is dropped, as it would fill the sphere in a random direction.
    alpha[null & (alpha.abs() <= noise * norm(alpha))] = 0.0

    if onward and toward is not None and (lowest > noise * largest or bool(alpha[null].any())):
        return _onward(eigenvalues, vectors, alpha, length, toward, null)

    def coefficients(s: float) -> Tensor:
        return torch.where(alpha == 0, torch.zeros_like(alpha), -alpha / (gap + s))

    if inside:
        # The pseudo-inverse solution, if it lies inside the ball.
        solvable = (eigenvalues > noise * largest) | (alpha == 0)
        if bool(solvable.all()):
            h = torch.where(alpha == 0, torch.zeros_like(alpha), -alpha / eigenvalues)
            if norm(h) <= length:
                return SmallSolution(vectors @ h, 0.0, _change(eigenvalues, h), largest)
    if norm(coefficients(0.0)) < length:
        # The hard case: the shift is zero, and the lowest eigenspace fills the sphere.
        h = _filled(coefficients(0.0), length, vectors, toward, null)
        change = _change(eigenvalues, h)
        return SmallSolution(vectors @ h, -lowest, change, largest, noise * largest, hard=True)
    # The common case, and the line that solves Eq. 4: h = -(T + mu I)^-1 a / 2 with the mu that gives h its length.
    s = _shift(alpha, gap, length)
    h = coefficients(s)
    h = h * (length / norm(h))
    return SmallSolution(vectors @ h, s - lowest, _change(eigenvalues, h), largest, noise * largest)


def _onward(
    eigenvalues: Tensor, vectors: Tensor, alpha: Tensor, length: float, toward: Tensor, null: Tensor
) -> SmallSolution:
    """The hard case as if the ``null`` eigenvectors, of the lowest eigenvalue, changed nothing.

    The step follows them to the side of ``toward``. ``alpha`` does not act on them: rounding may hide the lowest
    eigenvalue, and then hides too that ``alpha`` leads only back along them.
    """
    h = torch.where(null, torch.zeros_like(alpha), -alpha / eigenvalues)
    # The part of h that restores the function takes at most half of the squared length, so that the path goes on.
    h *= min(1.0, length * math.sqrt(0.5) / max(norm(h), 1e-300))
    h = _filled(h, length, vectors, toward, null)
    change, largest = _change(eigenvalues, h), float(eigenvalues[-1])
    return SmallSolution(
        vectors @ h, -float(eigenvalues[0]), change, largest, hard=True, stands_in=True
    )


def _filled(
    h: Tensor, length: float, vectors: Tensor, toward: Tensor | None, null: Tensor
) -> Tensor:
    """``h`` extended to the sphere along the ``null`` eigenvectors, to the side of ``toward``."""
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

    Newton's iteration on :math:`1/\|h(s)\| - 1/\varepsilon`, which is nearly linear (Hebden; More and Sorensen), inside
    a bracket. If Newton leaves the bracket, the bracket is bisected.
    """
    alpha = alpha / length  # so that the norm to reach is 1
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
