"""Layer by layer, as Optimal Brain Compression does: least squares on the inputs of each layer, and no training.

The shares of the layers are those of magnitudes relative to the layer's, which the other baselines choose by, too. Each
layer sees what the pruned layers before it give.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from recipes.common.batch_statistics import by_batch
from recipes.common.layer_inputs import LayerwiseOptions, input_gram, layers_of
from recipes.sparsify.layer_pruning import pruned
from recipes.sparsify.methods.baseline import Baseline
from recipes.sparsify.methods.method import Leg
from recipes.sparsify.ramp import Ramp
from recipes.sparsify.settings import SparsifySettings

SEEN = 1000  # the second moment of a layer's inputs is that of no fewer inputs than these, and hardly more


class Layerwise(Baseline):
    """Each layer is pruned in turn and sees what the pruned layers before it give."""

    title = "layer by layer"
    trains_on = "outputs"
    option_kinds = (*Baseline.option_kinds, LayerwiseOptions)
    each_from_dense = True

    @classmethod
    def legs(cls, sparsities: Sequence[float], settings: SparsifySettings) -> list[Leg]:
        """One leg to each sparsity, without training."""
        return [Leg(sparsity, epochs=0) for sparsity in sparsities]

    def moving(self, dense: nn.Module) -> nn.Module:
        """A copy that normalises by the statistics of each batch, as few weights are left."""
        return by_batch(dense)

    def shipped(self) -> nn.Module:
        """The network of now with running statistics that are measured on its inputs."""
        return self.with_measured_statistics()

    def begin_leg(self, leg: Leg) -> Ramp | None:
        """Prunes the dense network."""
        self.start_over()
        keep = self.choose(leg.sparsity)
        self.sparsity = leg.sparsity
        batches = list(islice(self.batches, -(-SEEN // len(next(self.batches)))))
        inputs = [self.inputs.augmented(batch) for batch in batches]
        self.masked.hold({name: self._prune(name, mask, inputs) for name, mask in keep.items()})
        return None

    @torch.no_grad()
    def _prune(self, name: str, mask: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Prunes a layer in place, to as many weights as the mask keeps; returns the mask of those."""
        layer = layers_of(self.model)[name.removesuffix(".weight")]
        gram = input_gram(self.model, layer, inputs)
        count = int((~mask).sum())
        damping = self.settings.of(LayerwiseOptions).damping
        weight, kept = pruned(layer.weight, gram, count, damping=damping)
        layer.weight.copy_(weight)
        self.progress(0, f"{self.sparsity:.2%} zeros, {name}")
        return kept
