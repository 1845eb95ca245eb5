"""Ways to learn one task after another with a few remembered inputs of the earlier ones.

Every learner gets the same remembered inputs, the same batches and the same tests on the way; ``recipes.new_task`` and
``recipes.split_tasks`` run them side by side. EWC, GEM and LwF are Avalanche's, in ``avalanche_learners``,
distillation by Muon takes timm's, in ``muon_learner``.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from torch.utils._pytree import tree_leaves

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.anchors import squared_distance
from fipoptim.output_space import flatten_outputs, output_map
from recipes.common.augment import Augment
from recipes.common.training import adam_one_cycle, train
from recipes.continual.known_outputs import Held, HeldOutputs, augmented, with_ranges

Batches = Iterator[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Tuning:
    """What is tuned of a method that is not ours.

    Attributes:
        lr: Adam's highest learning rate, or Muon's.
        strength: Weight of what holds the earlier tasks; None where nothing does.
        momentum: Adam's first beta, which cycles if None (see ``adam_one_cycle``), or Muon's momentum, 0.95 if None.
    """

    lr: float
    strength: float | None = None
    momentum: float | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the tasks after the first are learnt; ``tuning`` holds the other methods', most of the rest is the path's.

    Attributes:
        anchors: Remembered training inputs of each task.
        anchor_batch: How many of them each step sees; None is all.
        augment: Whether the path and distillation see them turned, sheared, scaled, shifted and mixed in pairs.
        beta: Weight of the new task's loss against the squared output change.
        eps: Length of a step, at the top of its schedule.
        schedule: Course of the step length, of ``SCHEDULES``.
        momentum: Share of the last step's gradient that is kept.
        precondition: Geometry of the step.
        output_space: In which outputs are compared; distillation compares them in it too.
        products: Metric products of a step.
        max_products: Most products of an adaptive step.
        radius: How far an adaptive step may move the outputs.
        max_drift: Bound that the drift on the anchors never passes.
        tuning: The other methods'.
    """

    anchors: int
    beta: float
    eps: float
    max_products: int
    tuning: Mapping[str, Tuning]
    anchor_batch: int | None = None
    augment: bool = False
    schedule: str = "one-cycle"
    momentum: float = 0.0
    precondition: str | None = "adam"
    output_space: str = "logits"
    products: str | int = "adaptive"
    radius: float | None = None
    max_drift: float | None = None

    @property
    def views(self) -> int:
        """How many an anchor is made by augmentation, so that a step sees ``anchor_batch`` of them."""
        return math.ceil((self.anchor_batch or self.anchors) / self.anchors)

    @property
    def drawn(self) -> int | None:
        """Anchors drawn for each step, before augmentation; None is all."""
        return None if self.views > 1 else self.anchor_batch

    def solver(self) -> Solver:
        """How Eq. 4 is solved."""
        return Solver(products=self.products, max_products=self.max_products, radius=self.radius)


# One more step than is taken: the last one would have length 0.
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, float, int], LRScheduler]] = {
    "one-cycle": lambda optimizer, lr, steps: OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps + 1, cycle_momentum=False
    ),
    "cosine": lambda optimizer, lr, steps: CosineAnnealingLR(optimizer, T_max=steps + 1),
    "constant": lambda optimizer, lr, steps: LambdaLR(optimizer, lambda step: 1.0),
}


class Learner(ABC):
    """A network that learns tasks in turn.

    Args:
        model: Trained in place.
        settings: How.
        tuning: This method's own, for the methods in ``settings.tuning``.
        augment: Makes few remembered inputs many, where the method can use it; None leaves them as they are.
        seed: Of what is drawn from the memory.
        freeze_batch_norm: Whether batch norm layers keep their running statistics and normalise by them.
        loss: Of outputs and labels, of the new task and where labels are remembered.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        tuning: Tuning | None,
        *,
        augment: Augment | None,
        seed: int,
        freeze_batch_norm: bool,
        loss: Loss = F.cross_entropy,
    ) -> None:
        self.model = model
        self.settings = settings
        self.augment = augment
        self.generator = torch.Generator().manual_seed(seed)
        self.freeze_batch_norm = freeze_batch_norm
        self.loss = loss
        if tuning is not None:
            self.lr, self.strength = tuning.lr, tuning.strength or 0.0
            self.momentum = tuning.momentum

    @abstractmethod
    def remember(self, inputs: Tensor, labels: Tensor, held: Held | None = None) -> None:
        """Keeps what is to be kept of the task just learnt.

        Args:
            inputs: A few of its inputs, ``(n, ...)``.
            labels: Theirs, ``(n,)``.
            held: Which outputs are held on them, where outputs are held; None is all. Be it always None or never.
        """

    @abstractmethod
    def state(self) -> Any:
        """What is remembered, to be saved with ``torch.save``."""

    @abstractmethod
    def load(self, state: Any) -> None:
        """Remembers what :meth:`state` gave."""

    @abstractmethod
    def remembered_bytes(self) -> int:
        """How much is kept of the earlier tasks: inputs, outputs, labels, networks, importances."""

    @abstractmethod
    def learn(
        self,
        batches: Batches,
        *,
        steps: int,
        after_step: Callable[[int], None] | None = None,
        record: tuple[int, Path] | None = None,
    ) -> float:
        """Learns the next task.

        Args:
            batches: Inputs and labels of each step.
            steps: How many there are.
            after_step: Called with the number of steps taken; its time is not counted.
            record: Every how many steps the network is kept, and the folder; for the path alone.

        Returns:
            Seconds spent, without what ``after_step`` took.
        """


class Plain(Learner):
    """Adam on the new task alone; the other learners that train by Adam add to its loss."""

    def remember(self, inputs: Tensor, labels: Tensor, held: Held | None = None) -> None:
        """Keeps nothing."""

    def state(self) -> Any:
        """Nothing."""
        return None

    def load(self, state: Any) -> None:
        """There is nothing to load."""

    def remembered_bytes(self) -> int:
        """None."""
        return 0

    def holding(self) -> Callable[[], Tensor] | None:
        """What is added to the loss of each step to hold the earlier tasks, if anything."""
        return None

    def objective(self) -> Loss:
        """The loss of outputs and labels of the new task, with what holds the earlier ones."""
        holding = self.holding()

        def held(z: Tensor, labels: Tensor) -> Tensor:
            value = self.loss(z, labels)
            return value if holding is None else value + holding()

        return held

    def optimizer(self, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """What takes the steps, and the schedule of its learning rate."""
        return adam_one_cycle(self.model, lr=self.lr, steps=steps, momentum=self.momentum)

    def learn(
        self,
        batches: Batches,
        *,
        steps: int,
        after_step: Callable[[int], None] | None = None,
        record: tuple[int, Path] | None = None,
    ) -> float:
        """See :class:`Learner`."""
        optimizer, scheduler = self.optimizer(steps)
        return train(
            self.model,
            batches,
            optimizer,
            scheduler,
            loss=self.objective(),
            freeze_batch_norm=self.freeze_batch_norm,
            after_step=after_step,
        )


class _Anchored(Learner):
    """What the path and distillation have in common: anchors, each referenced to the network it was kept from."""

    anchors: AnchorBatch | None = None

    def remember(self, inputs: Tensor, labels: Tensor, held: Held | None = None) -> None:
        """Keeps the inputs and the outputs they have now; labels are not read."""
        given = inputs if held is None else with_ranges(inputs, held)
        if self.anchors is not None:
            self.anchors.extend(given)
            return
        ranges = held is not None
        self.anchors = AnchorBatch(
            HeldOutputs(self.model) if ranges else self.model,
            given,
            output=self.settings.output_space,
            batch_size=self.settings.drawn,
            augment=augmented(self.augment) if ranges and self.augment else self.augment,
            generator=self.generator,
        )

    def state(self) -> Any:
        """The anchors with their references, and where the draws are."""
        return {"anchors": self.held().state_dict(), "generator": self.generator.get_state()}

    def load(self, state: Any) -> None:
        """See :class:`Learner`."""
        count, kept, held = self.settings.drawn or 1, state["anchors"]["inputs"], None
        if isinstance(kept, tuple):
            kept, ranges = kept
            held = tuple(ranges[0].tolist())
        self.remember(kept[:count], torch.empty(0), held)
        self.held().load_state_dict(state["anchors"])
        self.generator.set_state(state["generator"])

    def held(self) -> AnchorBatch:
        """The anchors.

        Raises:
            RuntimeError: If nothing was remembered yet.
        """
        if self.anchors is None:
            raise RuntimeError("call remember() with inputs of an earlier task before learn()")
        return self.anchors

    def remembered_bytes(self) -> int:
        """The anchors, their reference outputs, and with augmentation the reference networks."""
        return 0 if self.anchors is None else bytes_of(self.anchors.state_dict())


class InvariantPath(_Anchored):
    """A functionally invariant path: ``FIPOptimizer`` with the remembered inputs as anchors."""

    def optimizer(self, steps: int) -> tuple[FIPOptimizer, LRScheduler]:
        """What takes the steps, and the schedule of their length."""
        settings = self.settings
        optimizer = FIPOptimizer(
            self.model.parameters(),
            self.held(),
            beta=settings.beta,
            eps=settings.eps,
            momentum=settings.momentum,
            precondition=settings.precondition,
            max_drift=settings.max_drift,
            solver=settings.solver(),
            generator=self.generator,
        )
        return optimizer, SCHEDULES[settings.schedule](optimizer, settings.eps, steps)

    def learn(
        self,
        batches: Batches,
        *,
        steps: int,
        after_step: Callable[[int], None] | None = None,
        record: tuple[int, Path] | None = None,
    ) -> float:
        """See :class:`Learner`."""
        optimizer, scheduler = self.optimizer(steps)
        recording: AbstractContextManager[object] = contextlib.nullcontext()
        if record is not None:
            every, folder = record
            recording = optimizer.record(every=every, folder=folder)
        with recording:
            return train(
                self.model,
                batches,
                optimizer,
                scheduler,
                loss=self.loss,
                freeze_batch_norm=self.freeze_batch_norm,
                after_step=after_step,
            )


class Distillation(_Anchored, Plain):
    """Dark experience replay (Buzzega et al., 2020): Adam on the loss and the squared change of the outputs."""

    def holding(self) -> Callable[[], Tensor]:
        """The drift on each step's anchors, weighted."""
        anchors, draws = self.held(), itertools.count()
        space = output_map(self.settings.output_space)

        def drift() -> Tensor:
            inputs, reference = anchors.sample(next(draws))
            given = inputs if isinstance(inputs, tuple) else (inputs,)
            outputs = flatten_outputs(space(anchors.model(*given)), len(reference))
            return self.strength * squared_distance(outputs, reference).mean()

        return drift


class Replay(Plain):
    """Experience replay: Adam on the losses of the new task's batch and of remembered inputs with their labels."""

    memory: tuple[Tensor, Tensor] | None = None

    def remember(self, inputs: Tensor, labels: Tensor, held: Held | None = None) -> None:
        """Keeps the inputs and their labels."""
        new = (inputs, labels)
        old = self.memory
        self.memory = (
            new if old is None else (torch.cat([old[0], inputs]), torch.cat([old[1], labels]))
        )

    def state(self) -> Any:
        """The inputs and their labels, and where the draws are."""
        return {"memory": self.memory, "generator": self.generator.get_state()}

    def load(self, state: Any) -> None:
        """See :class:`Learner`."""
        self.memory = state["memory"]
        self.generator.set_state(state["generator"])

    def remembered_bytes(self) -> int:
        """The inputs and their labels."""
        return bytes_of(self.memory)

    def holding(self) -> Callable[[], Tensor] | None:
        """The loss on a draw from the memory, weighted."""
        if self.memory is None:
            return None
        inputs, labels = self.memory
        generator = self.generator

        def replayed() -> Tensor:
            chosen = torch.randperm(len(inputs), generator=generator)[: self.settings.anchor_batch]
            x, y = inputs[chosen.to(inputs.device)], labels[chosen.to(labels.device)]
            return self.strength * self.loss(self.model(x), y)

        return replayed


@dataclass(frozen=True)
class Method:
    """A way to learn the next task.

    Attributes:
        title: What tables and plots call it.
        learner: The class, as module and name: Avalanche is imported where it is wanted.
        steps_by: Whose learning rate and momentum are its to tune; None for the path, whose own are.
        strength: What its strength weighs, for ``--help``; None if it has none.
        needs: The distribution it needs beside those of the recipes.
    """

    title: str
    learner: tuple[str, str]
    steps_by: str | None = "Adam"
    strength: str | None = None
    needs: str | None = None


_HERE, _AVALANCHE = __name__, "recipes.continual.avalanche_learners"
METHODS = {
    "fip": Method("invariant path", (_HERE, "InvariantPath"), steps_by=None),
    "naive": Method("plain training", (_HERE, "Plain")),
    "distillation": Method(
        "distillation",
        (_HERE, "Distillation"),
        strength="weight of the squared output change",
    ),
    "distillation-muon": Method(
        "distillation, Muon",
        ("recipes.continual.muon_learner", "OrthogonalDistillation"),
        steps_by="Muon",
        strength="weight of the squared output change",
        needs="timm",
    ),
    "replay": Method(
        "replay, labels",
        (_HERE, "Replay"),
        strength="weight of the remembered inputs' loss",
    ),
    "ewc": Method(
        "EWC", (_AVALANCHE, "EWC"), strength="weight of the penalty (lambda)", needs="avalanche-lib"
    ),
    "gem": Method(
        "GEM", (_AVALANCHE, "GEM"), strength="memory strength (gamma)", needs="avalanche-lib"
    ),
    "lwf": Method(
        "LwF",
        (_AVALANCHE, "LwF"),
        strength="weight of the distillation (alpha)",
        needs="avalanche-lib",
    ),
}


def learner(method: str, model: nn.Module, settings: Settings, **keywords: Any) -> Learner:
    """The learner of a method in ``METHODS``; ``keywords`` are those of :class:`Learner`."""
    module, name = METHODS[method].learner
    made = getattr(importlib.import_module(module), name)
    built: Learner = made(model, settings, settings.tuning.get(method), **keywords)
    return built


def bytes_of(kept: Any) -> int:
    """The bytes of all tensors in a nested structure of tuples, lists and dicts."""
    return sum(t.nbytes for t in tree_leaves(kept) if isinstance(t, Tensor))


def missing(methods: Iterable[str]) -> dict[str, str]:
    """Which of the methods cannot run here, each with the distribution that is not installed."""
    found = {}
    for method in methods:
        needs = METHODS[method].needs
        if needs is not None:
            try:
                importlib.import_module(METHODS[method].learner[0])
            except ImportError:
                found[method] = needs
    return found
