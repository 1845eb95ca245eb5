"""The base of all pruning methods: the training loop from one sparsity to the next, and what it leaves."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from fipoptim.secondary import SparseProjection
from recipes.common.augment import Augment
from recipes.common.batch_statistics import with_statistics
from recipes.common.data import Task
from recipes.common.progress import Progress
from recipes.common.training import accuracy, steps_an_epoch, synchronize
from recipes.sparsify.dense import Dense
from recipes.sparsify.inputs import PruningInputs
from recipes.sparsify.masks import MaskedWeights
from recipes.sparsify.outcome import Outcome, SparseNetwork
from recipes.sparsify.ramp import Ramp
from recipes.sparsify.settings import SparsifySettings

SNAPSHOTS = 6  # networks of the path remembered in each leg
INPUTS_AT_ONCE = 500  # inputs whose outputs are computed at a time
MEASURED = 50  # batches on which running statistics are measured


@dataclass(frozen=True)
class Leg:
    """One training of a method, under one schedule.

    Attributes:
        sparsity: The sparsity at its end.
        epochs: Passes over the inputs.
        asked: True if that sparsity was asked for, False for a waypoint.
    """

    sparsity: float
    epochs: int
    asked: bool = True


@dataclass(frozen=True)
class Stepper:
    """The optimizer of one leg.

    Attributes:
        optimizer: The optimizer of the model's parameters.
        scheduler: Its schedule, stepped after each step.
        step: Takes one step with the optimizer, whose gradients are zero.
    """

    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    step: Callable[[], object]


class Method(ABC):
    """One run of a pruning method, from a dense network to each sparsity in turn.

    A new method derives from this class and is registered in ``recipes.sparsify.methods``.

    Attributes:
        title: The name in tables and plots.
        trains_on: Whether training follows the dense network's outputs or the labels.
        option_kinds: The dataclasses of the method's own options (``recipes.common.settings.option``); a run reads
            them with ``settings.of(kind)``.
        each_from_dense: Whether every sparsity is reached from the dense network, not from the sparsity before.
        keeps_path: Whether the weights on the path are remembered.

    Args:
        dense: The dense network; left as it is.
        task: The data. Labels are read only by methods that train on them.
        settings: The settings.
        augment: The augmentation that ``settings.augment`` may ask for.
        seed: The seed of the batches, the anchors and the random masks.
        progress: Called with the number of steps just taken and a text.
    """

    title: ClassVar[str]
    trains_on: ClassVar[Literal["outputs", "labels"]]
    option_kinds: ClassVar[tuple[type, ...]] = ()
    each_from_dense: ClassVar[bool] = False
    keeps_path: ClassVar[bool] = False

    def __init__(
        self,
        dense: Dense,
        task: Task,
        settings: SparsifySettings,
        *,
        augment: Augment | None,
        seed: int,
        progress: Progress = lambda steps, text: None,
    ) -> None:
        begun = time.perf_counter()
        self.task, self.settings, self.progress = task, settings, progress
        self.device = task.train_inputs.device
        self.generator = torch.Generator().manual_seed(seed)
        # Convolutions are faster with the channels last (by a fifth: ResNet-20, bfloat16, one core).
        self.dense = copy.deepcopy(dense.model).to(memory_format=torch.channels_last)
        self.dense = self.dense.eval().requires_grad_(False)
        self.model = self.moving(dense.model).to(memory_format=torch.channels_last)
        self.dense_state = copy.deepcopy(dense.model.state_dict())
        self.early_state = dense.early
        augmented = settings.augment == "all" or settings.augment == self.trains_on
        self.augment = augment if augmented else None
        self.inputs = PruningInputs(
            task,
            settings,
            augment=self.augment,
            mirror=settings.mirror and self.augment is None and self.trains_on != "labels",
            generator=self.generator,
        )
        self.batches = self.inputs.batches()
        names = SparseProjection(self.model, 0.0, keep=settings.keep).names
        self.masked = MaskedWeights(self.model, names)
        self.total = sum(weight.numel() for weight in self.masked.parameters.values())
        self.sparsity = 0.0
        self.leg_steps = 0
        self.path: list[Tensor] = []
        self.prepare()
        self.seconds = time.perf_counter() - begun

    # A method writes the abstract ones of these, and the others if it needs them.

    @classmethod
    def full_title(cls, settings: SparsifySettings, *, rewinds: bool) -> str:
        """The name in tables and plots of what runs with these settings.

        Args:
            settings: The settings.
            rewinds: Whether the dense network's weights early in training are known.
        """
        return cls.title

    @classmethod
    @abstractmethod
    def legs(cls, sparsities: Sequence[float], settings: SparsifySettings) -> list[Leg]:
        """The legs to these sparsities, which increase."""

    def moving(self, dense: nn.Module) -> nn.Module:
        """A copy of the dense network, whose weights the steps move."""
        return copy.deepcopy(dense)

    def shipped(self) -> nn.Module:
        """The network of now in eval mode, of the dense network's architecture."""
        return self.model.eval()

    def with_measured_statistics(self) -> nn.Module:
        """The weights of a network that :func:`by_batch` made, with running statistics measured on the inputs."""
        batches = (self.inputs.augmented(b) for b in islice(self.inputs.batches(), MEASURED))
        return with_statistics(self.model, self.dense, batches)

    def start_over(self) -> None:
        """Goes back to the dense network. The time of the legs before is no part of the next leg's."""
        self.seconds = 0.0
        everything = {n: torch.ones_like(m) for n, m in self.masked.masks.items()}
        dense = {name: self.dense_state[name] for name in self.model.state_dict()}
        self.masked.hold_only(everything, dense)

    def prepare(self) -> None:  # noqa: B027
        """Prepares a run after the model was copied and its weights masked; the time is counted."""

    @abstractmethod
    def begin_leg(self, leg: Leg) -> Ramp | None:
        """Begins a leg; ``leg_steps`` is the number of its steps.

        Returns:
            The rise of the sparsity in this leg; None if the leg begins with its final sparsity.
        """

    @abstractmethod
    def choose(self, sparsity: float) -> dict[str, Tensor]:
        """Chooses the weights to keep: bool tensors by the plain names of the parameters."""

    @abstractmethod
    def stepper(self, leg: Leg) -> Stepper:
        """Makes the optimizer of a leg."""

    def raise_sparsity(self, ramp: Ramp, step: int) -> None:
        """Chooses the weights to keep anew, at a step in which the sparsity rises."""
        self.hold(ramp.sparsity(step))

    # The run.

    def run(self, sparsities: Sequence[float]) -> Outcome:
        """Prunes to each sparsity.

        Args:
            sparsities: Shares of zeros, in increasing order.

        Raises:
            FloatingPointError: If weights are no longer finite.
        """
        networks, positions = [], []
        self._remember()
        legs = self.legs(sparsities, self.settings)
        for number, leg in enumerate(legs, start=1):
            self._train(leg, f"{number} of {len(legs)}: " if len(legs) > 1 else "")
            if leg.asked:
                networks.append(self._network(leg.sparsity))
                positions.append(len(self.path) - 1)
        return Outcome(networks, self.path, positions)

    def hold(self, sparsity: float) -> None:
        """Chooses the weights to keep at this sparsity and holds the others at zero."""
        self.sparsity = sparsity
        self.masked.hold(self.choose(sparsity))

    def _train(self, leg: Leg, prefix: str) -> None:
        """Trains to the sparsity of the leg; ``prefix`` begins the text of the progress bar."""
        self.leg_steps = leg.epochs * steps_an_epoch(self.task, self.settings.batch_size)
        begun = time.perf_counter()
        ramp = self.begin_leg(leg)
        stepper = self.stepper(leg)
        self.seconds += time.perf_counter() - begun
        spacing = max(1, self.leg_steps // SNAPSHOTS)
        for t in range(self.leg_steps):
            begun = time.perf_counter()
            if ramp is not None and ramp.rises_at(t, self.settings.mask_every):
                self.raise_sparsity(ramp, t)
            stepper.optimizer.zero_grad()
            stepper.step()
            stepper.scheduler.step()
            synchronize(self.device)
            self.seconds += time.perf_counter() - begun
            self.progress(1, f"{prefix}{self.sparsity:.2%} zeros")
            if (t + 1) % spacing == 0 or t + 1 == self.leg_steps:
                self._remember()
        if not bool(all(torch.isfinite(p).all() for p in self.model.parameters())):
            name = self.full_title(self.settings, rewinds=self.early_state is not None)
            raise FloatingPointError(f"{name}: the weights are not finite; lower the learning rate")

    def adam(self, lr: float, loss: Callable[[Tensor], Tensor]) -> Stepper:
        """Steps of Adam on one cycle, in train mode.

        Args:
            lr: The highest learning rate.
            loss: The loss of a batch, given by the indices of its inputs.
        """
        optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        scheduler = OneCycleLR(optimizer, max_lr=lr, total_steps=self.leg_steps + 1)

        def step() -> None:
            self.model.train()
            loss(next(self.batches)).backward()
            optimizer.step()
            self.masked.hold_again()

        return Stepper(optimizer, scheduler, step)

    # Losses of a batch, given by the indices of its inputs.

    def label_loss(self, batch: Tensor) -> Tensor:
        """The cross-entropy with the labels."""
        return F.cross_entropy(
            self.forward(self.inputs.augmented(batch)), self.inputs.labels[batch]
        )

    def distillation_loss(self, batch: Tensor) -> Tensor:
        """The divergence from the dense network's outputs at ``settings.temperature`` (Hinton et al., 2015)."""
        inputs, reference = self.with_reference(batch)
        return self.divergence(self.forward(inputs), reference)

    def divergence(self, z: Tensor, reference: Tensor) -> Tensor:
        """The divergence of outputs ``(n, classes)`` from those of the dense network."""
        t = self.settings.temperature
        return F.kl_div(
            (z / t).log_softmax(dim=1),
            (reference / t).log_softmax(dim=1),
            reduction="batchmean",
            log_target=True,
        ) * (t * t)

    def with_reference(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of a step, and the dense network's outputs ``(n, classes)`` on them."""
        inputs = self.inputs.augmented(batch)
        if self.reference is not None:
            return inputs, self.reference[batch]
        with torch.no_grad():
            return inputs, self.forward(inputs, self.dense)

    def forward(self, inputs: Tensor, model: nn.Module | None = None) -> Tensor:
        """The outputs ``(n, classes)`` in float32, of the pruned network unless another is given."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.settings.autocast):
            if inputs.ndim == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            z: Tensor = (model or self.model)(inputs)
        return z.float()

    @cached_property
    @torch.no_grad()
    def reference(self) -> Tensor | None:
        """The dense network's outputs on all inputs; None if they are not needed, or if the inputs are augmented."""
        if self.augment is not None or self.trains_on == "labels":
            return None
        parts = self.inputs.images.split(INPUTS_AT_ONCE)
        return torch.cat([self.forward(x, self.dense) for x in parts])

    # Measurements and memory.

    def _remember(self) -> None:
        if self.keeps_path:
            weights = self.masked.parameters.values()
            self.path.append(torch.cat([w.detach().flatten().cpu() for w in weights]))

    @cached_property
    def _dense_predictions(self) -> Tensor:
        """The classes ``(n,)`` that the dense network predicts for the test inputs."""
        with torch.no_grad():
            parts = self.task.test_inputs.split(INPUTS_AT_ONCE)
            return torch.cat([self.dense(x).argmax(dim=1) for x in parts])

    def _network(self, sparsity: float) -> SparseNetwork:
        """Tests the network as it is now."""
        begun = time.perf_counter()
        shipped = self.shipped()
        self.seconds += time.perf_counter() - begun
        state = {k: t.detach().cpu().clone().contiguous() for k, t in shipped.state_dict().items()}
        zeros = {name: int((state[name] == 0).sum()) for name in self.masked.names}
        inputs, labels = self.task.test_inputs, self.task.test_labels
        return SparseNetwork(
            sparsity=sparsity,
            zeros=sum(zeros.values()),
            total=self.total,
            per_layer={name: zeros[name] / state[name].numel() for name in zeros},
            accuracy=accuracy(shipped, inputs, labels, batch_size=INPUTS_AT_ONCE),
            agreement=accuracy(shipped, inputs, self._dense_predictions, batch_size=INPUTS_AT_ONCE),
            seconds=self.seconds,
            state=state,
        )
