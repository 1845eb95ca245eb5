r"""Restoring steps: :math:`(g + \mu P) v = -J^\top r / N`, for every damping :math:`\mu` from one Krylov space.

Of all steps that bring the outputs back as far, to first order, each is the shortest in the norm of ``P``. The drift
that it leaves, :math:`\frac1N \|r + J v\|^2`, is known from the small problem, so that the damping can be chosen for a
drift without a further product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fipoptim.solver.krylov import KrylovSpace, MatVec
from fipoptim.solver.space import WHOLE, Space

# The least damping, relative to the curvature along the gradient of the drift: with less, a step follows directions in
# which the outputs hardly change so far that the first order is no longer right.
LEAST_DAMPING = 1e-2


class RestoringSteps:
    r"""The restoring steps of all dampings at one point.

    Args:
        matvec: The product with ``g``; vectors have shape ``(n,)``. Its result is written to.
        gradient: :math:`J^\top r / N`, half the gradient of the drift, shape ``(n,)``.
        drift: The drift :math:`\frac1N \|r\|^2` of now.
        max_products: The most products to take.
        tol: The part of the gradient outside of the space, relative to the gradient, at which to stop.
        space: The space of the vectors, which may be divided among ranks.

    Attributes:
        products: The number of products taken.
        least_damping: The damping of the longest step that is offered.
    """

    def __init__(
        self,
        matvec: MatVec,
        gradient: Tensor,
        drift: float,
        *,
        max_products: int = 8,
        tol: float = 1e-6,
        space: Space = WHOLE,
    ) -> None:
        most = min(max_products, space.size(gradient))
        self._space = KrylovSpace(matvec, most, space=space)
        self._space.add_start(gradient)
        self._drift = drift
        self._size = space.norm(gradient)
        self.least_damping = 0.0
        while self._space.extend():
            self._solve()
            longest = self._coordinates(self.least_damping)
            if self._space.residual(longest) <= tol * self._size:
                break
        self.products = self._space.size

    def _solve(self) -> None:
        """Decompose T; in its eigenbasis each step is known in closed form."""
        values, vectors = torch.linalg.eigh(self._space.T)
        self._values = values.clamp(min=0)  # g is positive semi-definite: below zero is rounding
        self._vectors = vectors
        # The first basis vector is the gradient's direction.
        self._alpha = self._size * vectors[0]
        self.least_damping = LEAST_DAMPING * float(self._space.T[0, 0])

    def _coordinates(self, damping: float) -> Tensor:
        coordinates: Tensor = -self._vectors @ (self._alpha / (self._values + damping))
        return coordinates

    def predicted(self, damping: float) -> float:
        """The drift that the step of this damping leaves, to first order; it grows with the damping."""
        shifted = self._values + damping
        gained = self._alpha.square() * (self._values + 2 * damping) / shifted.square()
        return self._drift - float(gained.sum())

    def damping_for(self, drift: float) -> float:
        """The damping of the shortest step that is predicted to leave at most ``drift``, but not less than the least.

        Found by bisection, as :meth:`predicted` grows with the damping.
        """
        low = self.least_damping
        if not self.predicted(low) < drift:
            return low
        high = max(low, float(self._values[-1]), 1e-300)
        while self.predicted(high) < min(drift, self._drift * (1 - 1e-12)) and high < 1e300:
            high *= 16
        for _ in range(100):
            middle = math.sqrt(low * high)
            if not low < middle < high or high <= low * (1 + 1e-9):
                break
            if self.predicted(middle) <= drift:
                low = middle
            else:
                high = middle
        return low

    def step(self, damping: float) -> Tensor:
        """The step of this damping, shape ``(n,)``."""
        return self._space.combine(self._coordinates(damping))
