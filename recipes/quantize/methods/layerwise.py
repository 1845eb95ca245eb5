"""Layer by layer, as GPTQ does: least squares on the inputs of each layer, which come through the layers before it."""

from __future__ import annotations

from torch import nn

from fipoptim.secondary import OnGrid
from recipes.common.layer_inputs import LayerwiseOptions
from recipes.common.progress import Progress
from recipes.quantize.layer_rounding import rounded_in_turn
from recipes.quantize.methods.method import Case, Method
from recipes.quantize.settings import QuantizeSettings


class Layerwise(Method):
    """Each layer is rounded in turn and sees what the rounded layers before it give."""

    title = "layer by layer"
    option_kinds = (LayerwiseOptions,)

    def quantize(
        self, model: nn.Module, case: Case, settings: QuantizeSettings, progress: Progress
    ) -> dict[str, OnGrid]:
        """See :class:`Method`."""
        damping = settings.of(LayerwiseOptions).damping
        batches = case.images.split(settings.chunk_size)
        found = {}
        for name, layer in rounded_in_turn(model, batches, case.bits, damping=damping):
            found[name] = layer.grid
            progress(1, name)
        return found
