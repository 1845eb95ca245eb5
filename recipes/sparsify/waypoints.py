"""The way to a sparse network: what has to be visited between the sparsities that are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Of the weights that are left, one stage prunes no more than this share: more at once, and what the next stage needs
# is gone (LeNet-300-100 on MNIST to 99.4 %: 92 % correct in one stage, 97 in four).
MOST = 0.6
# A dense network has weights to spare, and loses so many in its first stage.
FIRST = 0.93


def stages(sparsities: Sequence[float]) -> list[list[float]]:
    """The stages to each sparsity, which is the last of its own.

    Waypoints are even in the logarithm of the share of weights left, for there they are equally hard.

    Args:
        sparsities: Increasing, at least 0 and below 1.
    """
    way = []
    here = 0.0
    for wanted in sparsities:
        # As if no more weights were left than could be pruned to FIRST in one stage.
        left = min(1 - here, (1 - FIRST) / (1 - MOST))
        count = max(1, math.ceil(math.log((1 - wanted) / left, 1 - MOST) - 1e-9))
        ratio = (1 - wanted) / left
        way.append([*(1 - left * ratio ** (k / count) for k in range(1, count)), wanted])
        here = wanted
    return way
