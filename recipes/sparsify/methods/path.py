"""The functionally invariant path: pulled to the nearest sparse network while the outputs are held; reads no label.

The secondary objective is the distance to the nearest sparse network, by default nearest in the anchors' metric. Every
stage on the way has equally many epochs (``recipes.sparsify.stages``). In the first half of a stage the sparsity rises,
in the second half the weights that are left settle. ``FIPOptimizer`` takes all steps, and keeps zeros at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from fipoptim import AnchorBatch, FIPOptimizer, Solver, restore
from fipoptim.secondary import SparseProjection
from recipes.common.batch_statistics import by_batch
from recipes.common.features import WithFeatures, softened
from recipes.common.options import COUNT, RATE, fraction, products, whole
from recipes.common.settings import option
from recipes.sparsify.features import (
    FEATURE_INPUTS,
    deviations,
    feature_modules,
    joined,
)
from recipes.sparsify.methods.method import INPUTS_AT_ONCE, Leg, Method, Stepper
from recipes.sparsify.metric_estimate import MetricEstimate
from recipes.sparsify.ramp import Ramp
from recipes.sparsify.scores import largest, layered_magnitude
from recipes.sparsify.settings import SWITCH, SparsifySettings
from recipes.sparsify.stages import stages

METRIC_INPUTS = 2000  # the metric's diagonal is estimated on no more inputs than these


@dataclass(frozen=True, kw_only=True)
class PathOptions:
    """The options of the path."""

    group: ClassVar[str] = "functionally invariant path"

    epochs: int = option("epochs for each stage of the path", **COUNT)
    # "metric": the smallest w² diag(g). "relative" and "magnitude": the smallest w², relative to the layer's or not.
    choose: Literal["metric", "relative", "magnitude"] = option(
        "measure of the weights, the largest of which are kept",
        default="metric",
        choices=["metric", "relative", "magnitude"],
    )
    beta: float = option("weight of the distance to the sparse network", default=1.0, **RATE)
    eps: float = option("length of a step, at the top of its schedule", **RATE)
    momentum: float = option(
        "decay of the running mean of a step's linear term", default=0.9, type=fraction, metavar="X"
    )
    products: int | str = option(
        "metric products a step: 0, a number, or adaptive", default=0, type=products, metavar="N"
    )
    max_products: int = option("most products of an adaptive step", default=16, **COUNT)
    restore: int = option(
        "products of the restoring steps on all inputs after each choice of weights, or 0",
        default=0,
        type=whole(0),
        metavar="N",
    )
    probes: int = option(
        "random pullbacks of an estimate of the metric's diagonal", default=4, **COUNT
    )
    metric_batch: int = option("inputs of such an estimate", default=128, **COUNT)
    metric_decay: float = option(
        "decay of the running mean of these estimates", default=0.95, type=fraction, metavar="X"
    )
    labels: bool = option("also follow the labels", default=False, **SWITCH)


class InvariantPath(Method):
    """Follows a functionally invariant path to sparse networks."""

    title = "invariant path"
    trains_on = "outputs"
    option_kinds = (PathOptions,)
    keeps_path = True

    @classmethod
    def full_title(cls, settings: SparsifySettings, *, rewinds: bool) -> str:
        """The title tells if features are held, or labels followed, too."""
        held = " with features" if settings.hold_features else ""
        return f"{cls.title}{held}{' + labels' if settings.of(PathOptions).labels else ''}"

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

    def moving(self, dense: nn.Module) -> nn.Module:
        """A copy that normalises by the statistics of each batch, as in training."""
        return by_batch(dense)

    def shipped(self) -> nn.Module:
        """The network of now with running statistics that are measured on its inputs."""
        return self.with_measured_statistics()

    def prepare(self) -> None:
        """Makes the anchors, the sparse projection and the estimate of the metric."""
        settings, self.options = self.settings, self.settings.of(PathOptions)
        self.projection = SparseProjection(
            self.model, 0.0, per_layer=settings.per_layer, keep=settings.keep
        )
        self.to_zero: list[tuple[Tensor, Tensor]] = []
        self.held, self.before = self.model, self.dense
        self.output: Callable[..., Tensor] = softened(settings.temperature)
        if settings.hold_features:
            names = feature_modules(self.dense)
            self.held = WithFeatures(self.model, names)
            self.before = WithFeatures(self.dense, names)
            scales = deviations(self.before, self.inputs.images[:FEATURE_INPUTS])
            self.output = joined(self.output, scales, settings.feature_weight)
        self.anchors = self._anchors(settings.batch_size, self.inputs.images, self.augment)
        self.estimate: MetricEstimate | None = None
        if self.options.choose == "metric":
            self.estimate = self._metric_estimate()

    def begin_leg(self, leg: Leg) -> Ramp | None:
        """Goes on from the sparsity before."""
        return Ramp.over(self.sparsity, leg.sparsity, self.leg_steps)

    def raise_sparsity(self, ramp: Ramp, step: int) -> None:
        """Chooses the weights to keep, restores the function, and chooses those that are pulled to zero next."""
        super().raise_sparsity(ramp, step)
        if self.options.restore:
            restore(self.held, self.anchors, max_products=self.options.restore, keep_zeros=True)
        masks = self._masks(ramp.sparsity(step + self.settings.mask_every))
        self.to_zero = [self._pulled(name, mask) for name, mask in masks.items()]

    def choose(self, sparsity: float) -> dict[str, Tensor]:
        """Keeps the weights of the nearest sparse network, in the metric or in the Euclidean norm."""
        if self.estimate is not None:
            self.projection.weighting = self.estimate.updated(self.projection.weighting)
        return self._masks(sparsity)

    def stepper(self, leg: Leg) -> Stepper:
        """Steps of ``FIPOptimizer`` on one cycle of their length.

        With ``keep_zeros`` Muon's geometry is Adam's, and its momentum is that of the drift's gradient, too.
        """
        options = self.options
        optimizer = FIPOptimizer(
            self.held.parameters(),
            self.anchors,
            secondary=self._secondary,
            beta=options.beta,
            eps=options.eps,
            momentum=options.momentum,
            precondition="muon",
            keep_zeros=True,
            solver=Solver(products=options.products, max_products=options.max_products),
            generator=self.generator,
        )
        scheduler = OneCycleLR(
            optimizer, max_lr=options.eps, total_steps=self.leg_steps + 1, cycle_momentum=False
        )
        return Stepper(optimizer, scheduler, optimizer.step)

    def _anchors(
        self, batch_size: int, images: Tensor, augment: Callable[[Tensor], Tensor] | None
    ) -> AnchorBatch:
        """Anchors whose reference is the dense network, and which take no memory if they hold features."""
        return AnchorBatch(
            self.held,
            images,
            output=self.output,
            reference=self.before,
            store="live" if augment is not None or self.held is not self.model else "full",
            batch_size=min(batch_size, len(images)),
            chunk_size=max(batch_size, INPUTS_AT_ONCE),
            generator=self.generator,
            augment=augment,
        )

    def _metric_estimate(self) -> MetricEstimate:
        options, images = self.options, self.inputs.images[:METRIC_INPUTS]
        return MetricEstimate(
            self.model,
            self._anchors(options.metric_batch, images, None),
            self.masked.names,
            probes=options.probes,
            decay=options.metric_decay,
            generator=self.generator,
        )

    def _masks(self, sparsity: float) -> dict[str, Tensor]:
        """The weights that are kept at a sparsity: bool tensors by name."""
        if self.options.choose == "relative":
            weights = self.masked.parameters.items()
            scores = {name: layered_magnitude(weight.detach()) for name, weight in weights}
            return largest(scores, sparsity, per_layer=self.settings.per_layer)
        self.projection.sparsity = sparsity
        return self.projection.masks()

    def _pulled(self, name: str, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A parameter and the weighting of its squares in the distance, which is 0 for weights that are kept."""
        parameter, weighting = self.model.get_parameter(name), self.projection.weighting
        return parameter, (~mask).to(parameter) if weighting is None else weighting[name] * ~mask

    def _secondary(self) -> Tensor:
        """The squared distance to the network that was chosen last; with ``labels`` also the loss on a batch."""
        parts = [(h * w.square()).sum() for w, h in self.to_zero]
        if self.options.labels:
            parts.append(self.label_loss(next(self.batches)))
        return sum(parts[1:], parts[0])
