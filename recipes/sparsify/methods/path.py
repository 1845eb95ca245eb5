"""The functionally invariant path: pulled to the nearest sparse network while the outputs are held; reads no label.

The secondary objective is the distance to the nearest sparse network, nearest in the anchors' metric. Every stage on
the way has equally many epochs (``recipes.sparsify.stages``). In the first half of a stage the sparsity rises, in the
second half the weights that are left settle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.secondary import SparseProjection
from recipes.common.options import COUNT, RATE, fraction, products
from recipes.common.settings import option
from recipes.sparsify.masks import MaskedWeights
from recipes.sparsify.methods.method import INPUTS_AT_ONCE, Leg, Method, Stepper
from recipes.sparsify.metric_estimate import MetricEstimate
from recipes.sparsify.ramp import Ramp
from recipes.sparsify.settings import SWITCH, SparsifySettings
from recipes.sparsify.stages import stages

METRIC_INPUTS = 2000  # the metric's diagonal is estimated on no more inputs than these


@dataclass(frozen=True, kw_only=True)
class PathOptions:
    """The options of the path."""

    group: ClassVar[str] = "functionally invariant path"

    epochs: int = option("epochs for each stage of the path", **COUNT)
    choose: Literal["metric", "magnitude"] = option(
        "measure of the weights, the largest of which are kept",
        default="metric",
        choices=["metric", "magnitude"],
    )
    beta: float = option("weight of the distance to the sparse network", default=1.0, **RATE)
    # The rate grows with the inverse root of the share of weights that are left, so that a step keeps its length.
    lr: float = option(
        "Adam's highest learning rate for the dense network, with no products", **RATE
    )
    # With 0, Adam takes the steps on drift and distance, on minibatches in train mode. Otherwise FIPOptimizer takes
    # them, on anchors in eval mode.
    products: int | str = option(
        "metric products a step: 0, a number, or adaptive", default=0, type=products, metavar="N"
    )
    max_products: int = option("most products of an adaptive step", default=16, **COUNT)
    eps: float = option(
        "length of a step with products, at the top of its schedule", default=5.0, **RATE
    )
    probes: int = option(
        "random pullbacks of an estimate of the metric's diagonal", default=4, **COUNT
    )
    metric_batch: int = option("inputs of such an estimate", default=128, **COUNT)
    metric_decay: float = option(
        "decay of the running mean of these estimates", default=0.95, type=fraction, metavar="X"
    )
    labels: bool = option("also follow the labels", default=False, **SWITCH)


def softened(temperature: float) -> Callable[[Tensor], Tensor]:
    r"""The output space :math:`2 T \sqrt{\text{softmax}(z / T)}`: the Fisher metric at a temperature."""

    def output(z: Tensor) -> Tensor:
        # This root, the exponential of half the logarithm, has a finite derivative even if a probability underflows.
        return 2 * temperature * (0.5 * (z.float() / temperature).log_softmax(dim=1)).exp()

    return output


class InvariantPath(Method):
    """Follows a functionally invariant path to sparse networks."""

    title = "invariant path"
    trains_on = "outputs"
    option_kinds = (PathOptions,)
    keeps_path = True

    @classmethod
    def full_title(cls, settings: SparsifySettings, *, rewinds: bool) -> str:
        """Without products the steps are Adam's own, and the title says so."""
        options = settings.of(PathOptions)
        name = "Adam on drift + distance" if options.products == 0 else cls.title
        return f"{name} + labels" if options.labels else name

    @classmethod
    def legs(cls, sparsities: Sequence[float], settings: SparsifySettings) -> list[Leg]:
        """A leg is a stage."""
        parts = stages(sparsities) if settings.waypoints else [[s] for s in sparsities]
        epochs = settings.of(PathOptions).epochs
        return [
            Leg(visited, epochs, asked=visited == sparsity)
            for part, sparsity in zip(parts, sparsities, strict=True)
            for visited in part
        ]

    def prepare(self) -> None:
        """Makes the sparse projection and the estimate of the metric."""
        settings, self.options = self.settings, self.settings.of(PathOptions)
        self.projection = SparseProjection(
            self.model, 0.0, per_layer=settings.per_layer, keep=settings.keep
        )
        self.output = softened(settings.temperature)
        self.to_zero: list[tuple[Tensor, Tensor]] = []
        self.estimate: MetricEstimate | None = None
        if self.options.choose == "metric":
            self.estimate = self._metric_estimate()

    def begin_leg(self, leg: Leg) -> Ramp | None:
        """Goes on from the sparsity before."""
        return Ramp.over(self.sparsity, leg.sparsity, self.leg_steps)

    def raise_sparsity(self, ramp: Ramp, step: int) -> None:
        """Chooses the weights to keep, and those that are pulled to zero because they go next."""
        super().raise_sparsity(ramp, step)
        self.projection.sparsity = ramp.sparsity(step + self.settings.mask_every)
        self.to_zero = self._weights_to_zero()

    def choose(self, sparsity: float) -> dict[str, Tensor]:
        """Keeps the weights of the nearest sparse network, in the metric or in the Euclidean norm."""
        if self.estimate is not None:
            self.projection.weighting = self.estimate.updated(self.projection.weighting)
        self.projection.sparsity = sparsity
        masks = self.projection.project_()
        return {name: masks[MaskedWeights.inner_name(name)] for name in self.masked.names}

    def stepper(self, leg: Leg) -> Stepper:
        """Adam's steps on drift and distance if no products are asked for; otherwise steps of ``FIPOptimizer``."""
        options = self.options
        if options.products == 0:
            return self.adam(options.lr / math.sqrt(1 - leg.sparsity), self._loss)
        self.model.eval()
        optimizer = FIPOptimizer(
            self.model.parameters(),
            self.anchors,
            secondary=self._secondary,
            beta=options.beta,
            eps=options.eps,
            precondition="adam",
            solver=Solver(products=options.products, max_products=options.max_products),
            generator=self.generator,
        )
        scheduler = OneCycleLR(
            optimizer, max_lr=options.eps, total_steps=self.leg_steps + 1, cycle_momentum=False
        )
        return Stepper(optimizer, scheduler, optimizer.step)

    @cached_property
    def anchors(self) -> AnchorBatch:
        """The anchors of all legs. They are made before anything is pruned: the reference is the dense network."""
        images, batch_size = self.inputs.images, self.settings.batch_size
        return AnchorBatch(
            self.model,
            images,
            output=self.output,
            batch_size=min(batch_size, len(images)),
            chunk_size=max(batch_size, INPUTS_AT_ONCE),
            generator=self.generator,
            augment=self.augment,
        )

    def _metric_estimate(self) -> MetricEstimate:
        options, images = self.options, self.inputs.images[:METRIC_INPUTS]
        anchors = AnchorBatch(
            self.model,
            images,
            output=self.output,
            batch_size=min(options.metric_batch, len(images)),
            chunk_size=INPUTS_AT_ONCE,
            generator=self.generator,
        )
        return MetricEstimate(
            self.model,
            anchors,
            [MaskedWeights.inner_name(name) for name in self.masked.names],
            probes=options.probes,
            decay=options.metric_decay,
            generator=self.generator,
        )

    def _weights_to_zero(self) -> list[tuple[Tensor, Tensor]]:
        """The weights that the projection zeroes: each parameter, and its weighting, which is 0 for other weights."""
        masks, weighting = self.projection.masks(), self.projection.weighting
        found: list[tuple[Tensor, Tensor]] = []
        for name in self.projection.names:
            parameter = self.model.get_parameter(name)
            h = torch.ones_like(parameter) if weighting is None else weighting[name]
            found.append((parameter, h.masked_fill(masks[name], 0.0)))
        return found

    def _distance(self) -> Tensor:
        """The squared distance of ``SparseProjection`` for the weights that were chosen last."""
        return torch.stack([(h * w.square()).sum() for w, h in self.to_zero]).sum()

    def _secondary(self) -> Tensor:
        """The objective of ``FIPOptimizer``."""
        distance = self._distance()
        if self.options.labels:
            distance = distance + self.label_loss(next(self.batches))
        return distance

    def _loss(self, batch: Tensor) -> Tensor:
        """The loss of Adam: the drift on the batch, and the distance to the nearest sparse network."""
        inputs, reference = self.with_reference(batch)
        z = self.forward(inputs)
        loss = (self.output(z) - self.output(reference)).square().sum(dim=1).mean()
        if self.projection.sparsity > self.sparsity:
            loss = loss + self.options.beta * self._distance()
        if self.options.labels:
            loss = loss + F.cross_entropy(z, self.inputs.labels[batch])
        return loss
