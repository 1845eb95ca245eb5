"""The settings that all measurements of ``recipes.spectrum`` share; the options of one are in its own file."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.common.options import COUNT, RATE
from recipes.common.recipe_settings import RecipeSettings
from recipes.common.settings import option


@dataclass(frozen=True, kw_only=True)
class SpectrumSettings(RecipeSettings):
    """The settings of all measurements.

    Attributes:
        anchors: Inputs over which the metric is the mean.
        leading: The leading eigenvalues of each spectrum.
        probes: Random vectors of each density.
        steps: Lanczos steps from each.
        top: The leading eigenvectors that count as the sensitive subspace.
        mu: The dampings of the effective dimension, in the unit of the eigenvalues.
    """

    anchors: int = option("inputs over which the metric is the mean", **COUNT)
    leading: int = option("leading eigenvalues of a spectrum", default=10, **COUNT)
    probes: int = option("random vectors of a density", default=4, **COUNT)
    steps: int = option("Lanczos steps from each", default=32, **COUNT)
    top: int = option("leading eigenvectors that span the sensitive subspace", **COUNT)
    mu: tuple[float, ...] = option(
        "dampings of the effective dimension", default=(0.01, 1.0, 100.0), nargs="+", **RATE
    )
