"""Rounding to nearest: every weight by itself, with the best scale for each output channel."""

from __future__ import annotations

from torch import nn

from fipoptim.secondary import OnGrid, QuantizedProjection
from recipes.common.progress import Progress
from recipes.quantize.methods.method import Case, Method
from recipes.quantize.settings import QuantizeSettings


class Rounding(Method):
    """The nearest network in the Euclidean norm. It sees images only for the statistics of batch norm."""

    title = "rounding"

    def steps(self, settings: QuantizeSettings, case: Case) -> int:
        """One."""
        return 1

    def quantize(
        self, model: nn.Module, case: Case, settings: QuantizeSettings, progress: Progress
    ) -> dict[str, OnGrid]:
        """See :class:`Method`."""
        found = QuantizedProjection(model, case.bits).project_()
        progress(1, "rounded")
        return found
