"""From a dense network to sparse ones: along a functionally invariant path, and as others go.

Every method visits the wanted sparsities in increasing order. The path gets there in stages (``waypoints``) of
equally many epochs; the other methods have epochs for as many stages, and more. Those that prune gradually go on from
one sparsity to the next: along the first half of the epochs the sparsity rises on a cubic (Zhu and Gupta, 2017), in the
second half the weights that are left settle.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.metric import AnchorMetric, Form
from fipoptim.secondary import SparseProjection
from recipes.common.augment import Augment
from recipes.common.data import Task
from recipes.common.progress import Progress
from recipes.common.training import accuracy, steps_an_epoch, synchronize
from recipes.sparsify.masks import MaskedWeights
from recipes.sparsify.waypoints import stages

RAMP = 0.5  # the part of the steps in which the sparsity rises
SNAPSHOTS = 6  # networks remembered on the way to each sparsity
METRIC_INPUTS = 2000  # from which those are drawn that the metric's diagonal is estimated on
ROUND = (
    0.6  # the largest share of the remaining weights that one round of the lottery ticket prunes
)
TESTED_AT_ONCE = 500


@dataclass(frozen=True)
class Settings:
    """What may be tuned; every field is an option of the command line.

    Attributes:
        epochs: Passes over as many inputs as the training set has, for each stage of the path.
        batch_size: Inputs of a step.
        lr: Adam's highest learning rate on the path, where steps take no products, for the dense network. It grows with
            the inverse root of the share of weights that are to be left, so that a step keeps its length.
        baseline_epochs: The same for the baselines, for each stage that the path takes to a sparsity; they get as much
            time as it does, or more.
        baseline_lr: Adam's highest learning rate in the baselines.
        mask_every: Steps between two choices of the weights to keep.
        waypoints: Whether the path visits sparsities between those asked for, where these are far apart.
        products: Metric products of a step: 0 is Adam's own step on drift and distance, on minibatches in training
            mode; ``"adaptive"`` or a number takes the steps of ``FIPOptimizer``, on anchors in eval mode.
        max_products: Most products of an adaptive step.
        eps: Length of a step of ``FIPOptimizer``, at the top of its schedule.
        beta: Weight of the distance to the sparse projection.
        temperature: Outputs are compared as ``2 T sqrt(softmax(z / T))``, and distilled at this temperature.
        choose: Whether the path keeps the weights that are largest in the metric, or in magnitude.
        probes: Random pullbacks of each estimate of the metric's diagonal.
        metric_batch: Inputs of each estimate.
        metric_decay: Decay of the running mean of the estimates.
        anchors: How many training inputs there are to prune with; None is all.
        augment: Which methods see the inputs of each step shifted (and flipped, for photographs): none, those that
            follow labels, or all. The dense network's outputs are computed once where the inputs stay the same.
        mirror: Whether those that follow the outputs of inputs that stay the same also see each input's mirror image.
        labels: Whether the path also follows the labels.
        autocast: Whether minibatches run in bfloat16; the metric never does.
        per_layer: Whether each layer gets the sparsity by itself.
        keep: Layers that are not pruned.
    """

    epochs: int
    batch_size: int
    lr: float
    baseline_epochs: int
    baseline_lr: float
    mask_every: int = 10
    waypoints: bool = True
    products: int | str = 0
    max_products: int = 16
    eps: float = 5.0
    beta: float = 1.0
    temperature: float = 4.0
    choose: Literal["metric", "magnitude"] = "metric"
    probes: int = 4
    metric_batch: int = 128
    metric_decay: float = 0.95
    anchors: int | None = None
    augment: Literal["none", "labels", "all"] = "none"
    mirror: bool = False
    labels: bool = False
    autocast: bool = False
    per_layer: bool = False
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A way to sparse networks: which weights stay, what training follows, and how the sparsity rises."""

    title: str
    choose: Literal["metric", "layered magnitude", "random"]
    follow: Literal["path", "outputs", "labels"]
    rise: Literal["gradual", "at once", "rounds"]


@dataclass(frozen=True)
class Leg:
    """One training of a method on its way, under one schedule.

    Attributes:
        sparsity: Where it leads.
        epochs: Passes over the inputs.
        asked: Whether that sparsity was asked for; a waypoint was not.
    """

    sparsity: float
    epochs: int
    asked: bool = True


# Plain magnitude empties the layer with the smallest weights, at the latest where little is left: 58 % correct on MNIST
# with LeNet-300-100 at 98 %, where magnitudes relative to their layer's keep 97 %.
METHODS = {
    "fip": Method("invariant path", "metric", "path", "gradual"),
    "gradual-distillation": Method("gradual, distilled", "layered magnitude", "outputs", "gradual"),
    "gradual": Method("gradual, labels", "layered magnitude", "labels", "gradual"),
    "lottery-ticket": Method("lottery ticket", "layered magnitude", "labels", "rounds"),
    "one-shot": Method("one-shot, labels", "layered magnitude", "labels", "at once"),
    "random": Method("random masks, labels", "random", "labels", "at once"),
}


@dataclass(frozen=True)
class Dense:
    """The start network. ``early`` are its weights early in training, or None where they are not known."""

    model: nn.Module
    early: dict[str, Tensor] | None


def title(method: str, settings: Settings, *, rewinds: bool) -> str:
    """What tables and plots call a method: what runs in it with these settings.

    Args:
        method: One of ``METHODS``.
        settings: How.
        rewinds: Whether weights from early in training are known, to which the lottery ticket goes back.
    """
    if method == "fip":
        name = "Adam on drift + distance" if settings.products == 0 else METHODS[method].title
        return f"{name} + labels" if settings.labels else name
    if METHODS[method].rise == "rounds" and not rewinds:
        return "iterative, labels"
    return METHODS[method].title


@dataclass(frozen=True)
class SparseNetwork:
    """One network that a method arrived at.

    Attributes:
        wanted: The sparsity asked for.
        zeros: Prunable weights that are exactly zero.
        total: Prunable weights.
        per_layer: The fraction of zeros by layer.
        accuracy: On the test inputs, percent.
        agreement: Test inputs on which the largest output is that of the dense network, percent.
        seconds: Time spent from the dense network to here, tests not counted.
        state: The weights and buffers, which load into the plain model.
    """

    wanted: float
    zeros: int
    total: int
    per_layer: dict[str, float]
    accuracy: float
    agreement: float
    seconds: float
    state: dict[str, Tensor] = field(repr=False)

    def metrics(self) -> dict[str, object]:
        """The numbers of ``results.json``."""
        return {
            "sparsity": self.zeros / self.total,
            "nonzero": self.total - self.zeros,
            "total": self.total,
            "accuracy": self.accuracy,
            "agreement": self.agreement,
            "per_layer_sparsity": self.per_layer,
            "seconds": self.seconds,
        }


@dataclass
class Run:
    """What a method left.

    Attributes:
        networks: Those it arrived at, one for each sparsity asked for.
        path: Prunable weights on the way, as flat vectors; the dense network's first.
        arrived: Which of them are the networks' own.
    """

    networks: list[SparseNetwork]
    path: list[Tensor]
    arrived: list[int]


def softened(temperature: float) -> Callable[[Tensor], Tensor]:
    r"""The output space :math:`2 T \sqrt{\text{softmax}(z / T)}`: the Fisher metric at a temperature."""

    def output(z: Tensor) -> Tensor:
        # The root of half the logarithm: its derivative is finite where a probability underflows.
        return 2 * temperature * (0.5 * (z.float() / temperature).log_softmax(dim=1)).exp()

    return output


def sparsify(
    method: str,
    dense: Dense,
    task: Task,
    sparsities: Sequence[float],
    settings: Settings,
    *,
    augment: Augment | None,
    seed: int,
    progress: Progress = lambda steps, text: None,
) -> Run:
    """Goes from the dense network to each sparsity in turn.

    Args:
        method: One of ``METHODS``.
        dense: Left as it is.
        task: Its training inputs are those there are to prune with (``settings.anchors`` of them, drawn by
            ``seed``); its labels are read by the methods that follow labels alone.
        sparsities: Increasing.
        settings: How.
        augment: What ``settings.augment`` does to the inputs of a step.
        seed: Of the batches, the anchors and the random masks.
        progress: Called with the number of steps just taken and what is going on.

    Returns:
        The networks, one a sparsity, and the way to them.
    """
    torch.manual_seed(seed)
    return _Pruning(method, dense, task, settings, augment, seed, progress).run(sparsities)


def _layered_magnitude(weight: Tensor) -> Tensor:
    """The square of each weight relative to those of its layer that are not smaller (LAMP, Lee et al., 2021).

    The largest weight of every layer scores 1, so no layer is emptied before the others.
    """
    squares, order = weight.flatten().square().sort()
    scores = squares / squares.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(squares.dtype).tiny)
    return torch.empty_like(scores).scatter_(0, order, scores).view_as(weight)


def _random_like(weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def legs(method: str, sparsities: Sequence[float], settings: Settings) -> list[Leg]:
    """What ``sparsify`` does in turn."""
    way = stages(sparsities) if settings.waypoints else [[wanted] for wanted in sparsities]
    epochs = settings.baseline_epochs
    if METHODS[method].follow == "path":
        return [
            Leg(on_the_way, settings.epochs, asked=on_the_way == wanted)
            for part, wanted in zip(way, sparsities, strict=True)
            for on_the_way in part
        ]
    if METHODS[method].rise == "rounds":
        return [Leg(wanted, epochs, asked=wanted in sparsities) for wanted in _rounds(sparsities)]
    return [Leg(wanted, epochs * len(part)) for part, wanted in zip(way, sparsities, strict=True)]


def total_steps(method: str, task: Task, sparsities: Sequence[float], settings: Settings) -> int:
    """How many steps ``sparsify`` takes."""
    epochs = sum(leg.epochs for leg in legs(method, sparsities, settings))
    return epochs * steps_an_epoch(task, settings.batch_size)


def _rounds(sparsities: Sequence[float]) -> list[float]:
    """The sparsities and what has to come between, where no round may prune more than ``ROUND`` of what is left."""
    rounds = [0.0]
    for wanted in sparsities:
        while (1 - wanted) < (1 - rounds[-1]) * (1 - ROUND) * (1 - 1e-9):
            rounds.append(1 - (1 - rounds[-1]) * (1 - ROUND))
        rounds.append(wanted)
    return rounds[1:]


class _Pruning:
    """One method on its way."""

    def __init__(
        self,
        method: str,
        dense: Dense,
        task: Task,
        settings: Settings,
        augment: Augment | None,
        seed: int,
        progress: Progress,
    ) -> None:
        start = time.perf_counter()
        self.name, self.method = method, METHODS[method]
        self.task, self.settings = task, settings
        self.steps = 0  # of the leg
        seeing = {"none": (), "labels": ("labels",), "all": ("path", "outputs", "labels")}
        self.augment = augment if self.method.follow in seeing[settings.augment] else None
        self.progress = progress
        # Convolutions are faster with the channels last (by a fifth: ResNet-20, bfloat16, one core).
        self.model = copy.deepcopy(dense.model).to(memory_format=torch.channels_last)
        self.dense = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.early = dense.early
        self.title = title(method, settings, rewinds=dense.early is not None)
        self.start = copy.deepcopy(dense.model.state_dict())
        self.generator = torch.Generator().manual_seed(seed)
        count = len(task.train_inputs)
        chosen = torch.randperm(count, generator=self.generator)[: settings.anchors or count]
        self.device = task.train_inputs.device
        self.inputs = task.train_inputs[chosen.to(self.device)]
        self.labels = task.train_labels[chosen.to(self.device)]
        if settings.mirror and self.augment is None and self.method.follow != "labels":
            # As many again, for which the dense network's outputs are computed once, too.
            self.inputs = torch.cat([self.inputs, self.inputs.flip(3)])
            self.labels = torch.cat([self.labels, self.labels])
        names = SparseProjection(self.model, 0.0, keep=settings.keep).names
        self.held = MaskedWeights(self.model, names)
        self.projection = SparseProjection(
            self.model, 0.0, per_layer=settings.per_layer, keep=settings.keep
        )
        self.output = softened(settings.temperature)
        self.reference = self._references()
        self.in_the_metric = self.method.choose == "metric" and settings.choose == "metric"
        if self.in_the_metric:
            few = self.inputs[:METRIC_INPUTS]
            self.metric_anchors = AnchorBatch(
                self.model,
                few,
                output=self.output,
                batch_size=min(settings.metric_batch, len(few)),
                chunk_size=TESTED_AT_ONCE,
                generator=self.generator,
            )
        self.estimates = 0
        self.form: Form | None = None
        self.pull: list[tuple[Tensor, Tensor]] = []
        self.path: list[Tensor] = []
        self.sparsity = 0.0
        self.batch_order: Iterator[Tensor] = self._batches()
        self.seconds = time.perf_counter() - start

    # --- from one sparsity to the next ----------------------------------------------------------------

    def run(self, sparsities: Sequence[float]) -> Run:
        networks, arrived = [], []
        self._remember()
        way = legs(self.name, sparsities, self.settings)
        for k, leg in enumerate(way, start=1):
            rising = self.method.rise == "gradual"
            if not rising:
                self._start_over(leg.sparsity)
            self._train(leg, rising=rising, of=f"{k} of {len(way)}" if len(way) > 1 else "")
            if leg.asked:
                networks.append(self._network(leg.sparsity))
                arrived.append(len(self.path) - 1)
        return Run(networks, self.path, arrived)

    def _start_over(self, wanted: float) -> None:
        """Prunes at once: the dense network, or for the lottery ticket what the last round trained."""
        if self.method.rise == "at once":
            self.seconds = 0.0
            self.held.hold_only(self._all(), self.start)
            self._hold(wanted)
        else:
            self._hold(wanted)
            if self.early is not None:
                self.held.hold_only(self.held.masks, self.early)

    def _train(self, leg: Leg, *, rising: bool, of: str) -> None:
        """From the sparsity of now to that of the leg; ``of`` says which one of how many it is."""
        wanted = leg.sparsity
        self.steps = leg.epochs * steps_an_epoch(self.task, self.settings.batch_size)
        start = time.perf_counter()
        optimizer, scheduler, step = self._mover(wanted)
        self.seconds += time.perf_counter() - start
        begun = self.sparsity
        ramp = int(RAMP * self.steps) if rising else 0

        def course(t: int) -> float:
            return wanted if t >= ramp else wanted - (wanted - begun) * (1 - t / ramp) ** 3

        every = self.settings.mask_every
        spacing = max(1, self.steps // SNAPSHOTS)
        for t in range(self.steps):
            start = time.perf_counter()
            if rising and t <= ramp and (t % every == 0 or t == ramp):
                self._hold(course(t))
                if self.method.follow == "path":
                    # The weights that go next are those that are pulled to zero.
                    self.projection.sparsity = course(t + every)
                    self.pull = self._pull()
            optimizer.zero_grad()
            step(optimizer)
            scheduler.step()
            synchronize(self.device)
            self.seconds += time.perf_counter() - start
            self.progress(1, f"{of and of + ': '}{self.sparsity:.2%} zeros")
            if (t + 1) % spacing == 0 or t + 1 == self.steps:
                self._remember()
        if not bool(all(torch.isfinite(p).all() for p in self.model.parameters())):
            raise FloatingPointError(
                f"{self.title}: the weights are not finite; lower the learning rate"
            )

    def _hold(self, sparsity: float) -> None:
        """Chooses the weights to keep at this sparsity and holds the others at zero."""
        self.sparsity = sparsity
        if self.method.choose in ("layered magnitude", "random"):
            scores = [
                _random_like(p, self.generator)
                if self.method.choose == "random"
                else _layered_magnitude(p.detach())
                for p in self.held.parameters.values()
            ]
            self.held.hold(self._largest(scores, sparsity))
            return
        if self.in_the_metric:
            self._estimate_metric()
        self.projection.sparsity = sparsity
        kept = self.projection.project_()
        self.held.hold({name: kept[MaskedWeights.inner_name(name)] for name in self.held.names})

    def _estimate_metric(self) -> None:
        """Follows the metric's diagonal along the path with a running mean of estimates."""
        names = [MaskedWeights.inner_name(name) for name in self.held.names]
        metric = AnchorMetric(
            self.metric_anchors,
            [self.model.get_parameter(name) for name in names],
            sample=self.metric_anchors.sample(self.estimates),
            form=self.form,
        )
        self.form = metric.form  # found once: the model stays what it is
        before, decay, probes = (
            self.projection.weighting,
            self.settings.metric_decay,
            self.settings.probes,
        )
        if before is None:  # nothing to build on: as many probes as the running mean remembers
            probes *= round(1 / (1 - decay))
        diagonal = metric.diagonal(probes, generator=self.generator)
        now = dict(zip(metric.names, metric.unflatten(diagonal), strict=True))
        self.estimates += 1
        self.projection.weighting = (
            now if before is None else {k: decay * before[k] + (1 - decay) * now[k] for k in now}
        )

    def _largest(self, scores: list[Tensor], sparsity: float) -> dict[str, Tensor]:
        """Masks of the size that the projection has, of the largest scores; one score tensor a parameter."""
        groups = [[score] for score in scores] if self.settings.per_layer else [scores]
        kept = []
        for group in groups:
            flat = torch.cat([score.flatten() for score in group])
            mask = torch.ones_like(flat, dtype=torch.bool)
            mask[flat.argsort(stable=True)[: round(sparsity * len(flat))]] = False
            kept += mask.split([score.numel() for score in group])
        return {
            name: part.view_as(score)
            for name, part, score in zip(self.held.names, kept, scores, strict=True)
        }

    def _all(self) -> dict[str, Tensor]:
        return {n: torch.ones_like(p, dtype=torch.bool) for n, p in self.held.parameters.items()}

    # --- one step ----------------------------------------------------------------------------------------

    def _mover(
        self, wanted: float
    ) -> tuple[torch.optim.Optimizer, LRScheduler, Callable[[torch.optim.Optimizer], None]]:
        """An optimizer on the way to a sparsity, its schedule, and one step with it."""
        settings = self.settings
        if self.method.follow == "path" and settings.products != 0:
            return self._path_optimizer()
        path = self.method.follow == "path"
        lr = settings.lr / math.sqrt(1 - wanted) if path else settings.baseline_lr
        adam = torch.optim.Adam(self.model.parameters(), lr=lr)
        scheduler = OneCycleLR(adam, max_lr=lr, total_steps=self.steps + 1)
        loss = {"path": self._path_loss, "outputs": self._distillation, "labels": self._labels}

        def step(optimizer: torch.optim.Optimizer) -> None:
            self.model.train()
            loss[self.method.follow](next(self.batch_order)).backward()
            optimizer.step()

        return adam, scheduler, step

    @cached_property
    def anchors(self) -> AnchorBatch:
        """Made once, before anything is pruned: the reference stays the dense network's outputs."""
        return AnchorBatch(
            self.model,
            self.inputs,
            output=self.output,
            batch_size=min(self.settings.batch_size, len(self.inputs)),
            chunk_size=max(self.settings.batch_size, TESTED_AT_ONCE),
            generator=self.generator,
            augment=self.augment,
        )

    def _path_optimizer(
        self,
    ) -> tuple[FIPOptimizer, LRScheduler, Callable[[torch.optim.Optimizer], None]]:
        settings = self.settings
        self.model.eval()
        optimizer = FIPOptimizer(
            self.model.parameters(),
            self.anchors,
            secondary=self._secondary,
            beta=settings.beta,
            eps=settings.eps,
            precondition="adam",
            solver=Solver(products=settings.products, max_products=settings.max_products),
            generator=self.generator,
        )
        scheduler = OneCycleLR(
            optimizer, max_lr=settings.eps, total_steps=self.steps + 1, cycle_momentum=False
        )
        return optimizer, scheduler, lambda optimizer: optimizer.step()

    def _pull(self) -> list[tuple[Tensor, Tensor]]:
        """The weights that the projection is about to zero: each parameter, and its weighting there, 0 elsewhere."""
        kept, weighting = self.projection.masks(), self.projection.weighting
        pull: list[tuple[Tensor, Tensor]] = []
        for name in self.projection.names:
            parameter = self.model.get_parameter(name)
            h = torch.ones_like(parameter) if weighting is None else weighting[name]
            pull.append((parameter, h.masked_fill(kept[name], 0.0)))
        return pull

    def _distance(self) -> Tensor:
        """The squared distance of ``SparseProjection``, with the choice of weights held until the next one."""
        return torch.stack([(h * w.square()).sum() for w, h in self.pull]).sum()

    def _secondary(self) -> Tensor:
        distance = self._distance()
        if self.settings.labels:
            distance = distance + self._labels(next(self.batch_order))
        return distance

    def _path_loss(self, batch: Tensor) -> Tensor:
        """Drift on the batch, and the distance to the sparse projection."""
        inputs, reference = self._seen(batch)
        z = self._forward(inputs)
        change = self.output(z) - self.output(reference)
        loss = change.square().sum(dim=1).mean()
        if self.projection.sparsity > self.sparsity:
            loss = loss + self.settings.beta * self._distance()
        if self.settings.labels:
            loss = loss + F.cross_entropy(z, self.labels[batch])
        return loss

    def _distillation(self, batch: Tensor) -> Tensor:
        inputs, reference = self._seen(batch)
        t = self.settings.temperature
        return F.kl_div(
            (self._forward(inputs) / t).log_softmax(dim=1),
            (reference / t).log_softmax(dim=1),
            reduction="batchmean",
            log_target=True,
        ) * (t * t)

    def _labels(self, batch: Tensor) -> Tensor:
        inputs = self.inputs[batch]
        if self.augment is not None:
            inputs = self.augment(inputs)
        return F.cross_entropy(self._forward(inputs), self.labels[batch])

    def _seen(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of a step and the dense network's outputs on them."""
        inputs = self.inputs[batch]
        if self.augment is None:
            assert self.reference is not None
            return inputs, self.reference[batch]
        inputs = self.augment(inputs)
        with torch.no_grad():
            return inputs, self._forward(inputs, self.dense)

    def _forward(self, inputs: Tensor, model: nn.Module | None = None) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.settings.autocast):
            if inputs.ndim == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            z: Tensor = (model or self.model)(inputs)
        return z.float()

    @torch.no_grad()
    def _references(self) -> Tensor | None:
        """The dense network's outputs on all inputs, where these are always the same."""
        if self.augment is not None or self.method.follow == "labels":
            return None
        return torch.cat([self._forward(x, self.dense) for x in self.inputs.split(TESTED_AT_ONCE)])

    def _batches(self) -> Iterator[Tensor]:
        """Shuffled indices of the inputs; a batch is never larger than what there is."""
        count = len(self.inputs)
        size = min(self.settings.batch_size, count)
        while True:
            order = torch.randperm(count, generator=self.generator).to(self.device)
            for k in range(count // size):
                yield order[k * size : (k + 1) * size]

    # --- what is left behind ------------------------------------------------------------------------------

    def _remember(self) -> None:
        if self.method.follow == "path":
            state = self.held.state()
            self.path.append(torch.cat([state[name].flatten().cpu() for name in self.held.names]))

    @cached_property
    def dense_predictions(self) -> Tensor:
        """The dense network's classes of the test inputs."""
        with torch.no_grad():
            parts = self.task.test_inputs.split(TESTED_AT_ONCE)
            return torch.cat([self.dense(x).argmax(dim=1) for x in parts])

    def _network(self, wanted: float) -> SparseNetwork:
        state = {name: tensor.cpu().contiguous() for name, tensor in self.held.state().items()}
        zeros = {name: int((state[name] == 0).sum()) for name in self.held.names}
        tested = (self.task.test_inputs, self.task.test_labels)
        return SparseNetwork(
            wanted=wanted,
            zeros=sum(zeros.values()),
            total=self.projection.total,
            per_layer={name: zeros[name] / state[name].numel() for name in zeros},
            accuracy=accuracy(self.model, *tested, batch_size=TESTED_AT_ONCE),
            agreement=accuracy(
                self.model, tested[0], self.dense_predictions, batch_size=TESTED_AT_ONCE
            ),
            seconds=self.seconds,
            state=state,
        )
