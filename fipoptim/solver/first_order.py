r"""The step of Eq. 4 without products, as if ``g`` were zero."""

from __future__ import annotations

import math

from torch import Tensor

from fipoptim.solver.preconditioner import Preconditioner
from fipoptim.solver.space import WHOLE, Space


def first_order_step(
    linear: Tensor,
    length: float,
    preconditioner: Preconditioner | None = None,
    *,
    space: Space = WHOLE,
) -> tuple[Tensor, float]:
    r"""The step for ``g = 0``, :math:`v = -\varepsilon P^{-1} c / \|c\|_{P^{-1}}`, and its gain :math:`-c^\top v`.

    Args:
        linear: The linear term ``c``, shape ``(n,)``.
        length: The length :math:`\varepsilon` of the step.
        preconditioner: ``P``; None is the identity.
        space: The space of the vectors, which may be divided among ranks.

    Returns:
        The step, shape ``(n,)``, and the gain. Both are zero if ``c`` is.
    """
    if preconditioner is None:
        direction, size = space.unit(linear)
        return direction.mul_(-length), length * size
    direction = preconditioner.inverse(linear)
    square, scale = space.inner(linear, direction), 1.0
    if not 1e-30 < square < 1e30:
        # In float32 the square may overflow or underflow; that of the unit vector does not.
        linear, scale = space.unit(linear)
        direction = preconditioner.inverse(linear)
        square = space.inner(linear, direction)
    size = math.sqrt(max(square, 0.0))
    if size == 0.0:
        return direction, 0.0
    return direction.mul_(-length / size), length * scale * size
