"""The stages to a sparse network: which sparsities are visited between those that are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

# One stage prunes no more than this share of the weights that are left. If it prunes more at once, the weights that the
# next stage needs are gone (LeNet-300-100 on MNIST to 99.4 %: 92 % correct in one stage, 97 % in four).
MOST = 0.6
# A dense network has weights to spare: its first stage may prune this share of them.
FIRST = 0.93


def stages(sparsities: Sequence[float]) -> list[list[float]]:
    """The stages to each sparsity; the last stage of each list ends at the sparsity itself.

    The waypoints before it are even in the logarithm of the share of weights that are left, because they are equally
    hard to reach then.

    Args:
        sparsities: Shares of zeros, at least 0 and below 1, in increasing order.

    Returns:
        For each sparsity a list of shares of zeros, in increasing order.
    """
    found = []
    reached = 0.0
    for sparsity in sparsities:
        # A dense network counts as if so few weights were left that one stage leads to FIRST.
        left = min(1 - reached, (1 - FIRST) / (1 - MOST))
        count = max(1, math.ceil(math.log((1 - sparsity) / left, 1 - MOST) - 1e-9))
        ratio = (1 - sparsity) / left
        waypoints = (1 - left * ratio ** (k / count) for k in range(1, count))
        found.append([*waypoints, sparsity])
        reached = sparsity
    return found
