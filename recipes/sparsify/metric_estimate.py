"""The diagonal of the anchors' metric, followed along a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch
from fipoptim.metric.chunks import Form
from fipoptim.metric.metric import AnchorMetric


class MetricEstimate:
    """A running mean of random estimates of the metric's diagonal.

    Args:
        model: The network, which may change between two estimates.
        anchors: Its anchors; each estimate takes one batch of them.
        parameters: Names of the parameters whose part of the diagonal is estimated.
        probes: Random pullbacks of each estimate.
        decay: The share of the mean so far that each update keeps.
        generator: The generator of the pullbacks.
    """

    def __init__(
        self,
        model: nn.Module,
        anchors: AnchorBatch,
        parameters: Sequence[str],
        *,
        probes: int,
        decay: float,
        generator: torch.Generator,
    ) -> None:
        self.model, self.anchors, self.parameters = model, anchors, parameters
        self.probes, self.decay, self.generator = probes, decay, generator
        self.updates = 0
        self._form: Form | None = None

    def updated(self, mean: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The mean after one more estimate.

        Args:
            mean: The mean so far, by parameter name; None before the first estimate.

        Returns:
            The new mean, a tensor of the parameter's shape for each name.
        """
        metric = AnchorMetric(
            self.anchors,
            [self.model.get_parameter(name) for name in self.parameters],
            sample=self.anchors.sample(self.updates),
            form=self._form,
            trace=False,  # it would not pay for a few pullbacks
        )
        self._form = metric.form  # the first metric finds it; the kind of model does not change
        self.updates += 1
        probes = self.probes
        if (
            mean is None
        ):  # the first estimate takes as many probes as the running mean remembers later
            probes *= round(1 / (1 - self.decay))
        diagonal = metric.diagonal(probes, generator=self.generator)
        new = dict(zip(self.parameters, metric.unflatten(diagonal), strict=True))
        if mean is None:
            return new
        return {k: self.decay * mean[k] + (1 - self.decay) * new[k] for k in new}
