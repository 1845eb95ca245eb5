"""The settings with which Eq. 4 is solved."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Solver:
    r"""How Eq. 4 is solved.

    Args:
        products: The number of metric products a step takes. 0 takes the first-order step; another integer takes
            exactly so many products, or fewer if the solution has converged. ``"adaptive"`` tries the first-order step,
            keeps it if its effect on the outputs is good enough, and else takes up to ``max_products``.
        max_products: The most products an adaptive step takes.
        tol: The relative KKT residual at which the solution counts as converged.
        radius: How far a step may move the anchors' outputs: RMS over anchors of :math:`\|\Delta z\|`. A step without
            products is measured, a step with products is judged to first order. The adaptive solver takes products if
            the first-order step goes further; a step that still does is shortened to the radius. With None, a
            first-order step is good enough if it does not pass the minimum of Eq. 4 along its own line.

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

    @property
    def adaptive(self) -> bool:
        """Whether the number of products follows from the first-order step's effect."""
        return self.products == "adaptive"

    @property
    def tries_first_order(self) -> bool:
        """Whether a step begins with the first-order step: it is adaptive, or takes no product at all."""
        return self.adaptive or self.products == 0

    @property
    def most_products(self) -> int:
        """The most products a step takes, once it takes any."""
        return self.max_products if self.adaptive else int(self.products)

    def accepts(self, change: float, multiplier: float) -> bool:
        r"""Whether an adaptive step is good enough.

        Args:
            change: How far it moves the outputs, RMS over anchors of :math:`\|\Delta z\|`.
            multiplier: The multiplier :math:`\mu` of Eq. 4; below 0 the step passes the minimum along its line.
        """
        return change <= self.radius if self.radius is not None else multiplier >= 0
