"""What the logs of a training loop say of a FIPOptimizer: numbers by name."""

from __future__ import annotations

from fipoptim.optimizer import FIPOptimizer
from fipoptim.restoring import Restored


def drift_figures(optimizer: FIPOptimizer) -> dict[str, float]:
    """The distance of the network of now from the reference, on the inputs on which budgets count, and the budget.

    Takes one evaluation of these inputs. ``drift`` is in squared units of the output space, ``flips`` the share of
    changed predictions; ``max_drift`` and ``max_flips`` are there if they bound anything.
    """
    found, budget = optimizer.anchors.counted.measure(), optimizer.budget
    bounds = {"max_drift": budget.max_drift, "max_flips": budget.max_flips}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return {"drift": found.drift, "flips": found.flips} | given


def settle_figures(settled: Restored) -> dict[str, float]:
    """What a settlement found and took: drift and flips before it, products, the share of the way back, seconds."""
    return {
        "settle_drift_before": settled.before.drift,
        "settle_flips_before": settled.before.flips,
        "settle_products": float(settled.products),
        "settle_went_back": settled.went_back,
        "settle_seconds": settled.seconds,
    }
