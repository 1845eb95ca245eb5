"""Distillation: Adam on the new task's loss and the squared change of the outputs on remembered inputs.

This is dark experience replay (DER; Buzzega et al., 2020). No label of a remembered input is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fipoptim.anchors.output_space import flatten_outputs, output_map, squared_distance
from recipes.common.options import NUMBER
from recipes.common.settings import option
from recipes.continual.methods.anchored import AnchoredLearner
from recipes.continual.methods.base import Method
from recipes.continual.methods.plain import AdamOptions, Plain


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(AdamOptions):
    """Adam's options, and ``strength``: the weight of the squared output change."""

    strength: float = option("weight of the squared output change", default=0.1, **NUMBER)


class Distillation(AnchoredLearner, Plain):
    """Adam on the loss and on the drift of the outputs on the anchors."""

    options: DistillationOptions

    def holding(self) -> Callable[[], Tensor]:
        """The drift on the anchors of each step, weighted."""
        anchors, draws = self.known_anchors(), itertools.count()
        space = output_map(self.settings.output_space)

        def drift() -> Tensor:
            inputs, reference = anchors.sample(next(draws))
            arguments = inputs if isinstance(inputs, tuple) else (inputs,)
            outputs = flatten_outputs(space(anchors.model(*arguments)), len(reference))
            return self.options.strength * squared_distance(outputs, reference).mean()

        return drift


METHOD = Method("distillation", "distillation", Distillation, DistillationOptions)
