"""Several networks from one: by walking along functionally invariant paths, and as others make ensembles.

Every way leaves its members as files in a folder, so that however many there are, one is in memory at a time.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.anchors import squared_distance
from fipoptim.secondary import Diversity
from recipes import report
from recipes.augment import Augment
from recipes.data import DATASETS, Task
from recipes.training import adam_one_cycle, minibatches, seed_everything, steps_an_epoch, train

Progress = Callable[[int, str], None]
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Settings:
    """What may be tuned; every field is an option of the command line.

    Attributes:
        members: Networks of an ensemble.
        epochs: Passes over the training set of a network trained from scratch.
        batch_size: Inputs of a training step.
        lr: Adam's highest learning rate in that training.
        autocast: Whether minibatches run in bfloat16; paths never do.
        anchors: How many training inputs hold the function; None is all.
        anchor_batch: How many of them each step of a path sees, drawn anew.
        straight_eps: Length of a step of a path without objective.
        straight_away: Steps of it to the first member, or to where gradients begin to turn.
        straight_between: Steps of it from one member to the next.
        straight_products: Metric products of each.
        eps: Length of a step that turns input gradients away, in Adam's geometry; it falls towards each member.
        away: Steps of that to the first member.
        between: Steps of that from one member to the next.
        beta: Weight of the gradients' likeness against the squared output change.
        output_space: In which the function is held.
        diversity_batch: Inputs whose gradients are turned away, each step.
        noise: Largest change of a pixel by noise in these inputs.
        others: Earlier members that gradients are turned away from beside the start network, at most.
        snapshot_epochs: Passes from one snapshot of distillation to the next.
        snapshot_lr: Adam's learning rate there.
        snapshot_strength: Weight of the squared output change against the likeness.
        cycle_epochs: Passes of a cycle of fast geometric ensembling.
        cycle_lr: Its highest learning rate (SGD with momentum); the lowest is a hundredth.
    """

    members: int
    epochs: int
    batch_size: int
    lr: float = 3e-3
    autocast: bool = False
    anchors: int | None = None
    anchor_batch: int = 128
    straight_eps: float = 1.0
    straight_away: int = 60
    straight_between: int = 10
    straight_products: int = 8
    eps: float = 1.0
    away: int = 400
    between: int = 50
    beta: float = 50.0
    output_space: str = "logits"
    diversity_batch: int = 64
    noise: float = 0.0
    others: int = 2
    snapshot_epochs: float = 1.0
    snapshot_lr: float = 1e-3
    snapshot_strength: float = 0.1
    cycle_epochs: float = 2.0
    cycle_lr: float = 0.02


@dataclass(frozen=True)
class Way:
    """A way to an ensemble.

    Attributes:
        title: What tables and plots call it.
        objective: What moves the path; None for the ways that are no paths.
    """

    title: str
    objective: Literal["none", "misalign", "both"] | None = None


WAYS = {
    "none": Way("path, L = 0", "none"),
    "misalign": Way("path, misaligned", "misalign"),
    "both": Way("path, both", "both"),
    "independent": Way("independent"),
    "fge": Way("fast geometric"),
    "distillation": Way("distilled, misaligned"),
    "noise": Way("weight noise"),
}
PATHS = tuple(name for name, way in WAYS.items() if way.objective is not None)
BASELINES = tuple(name for name, way in WAYS.items() if way.objective is None)


@dataclass
class Ensemble:
    """Networks in files.

    Attributes:
        model: The architecture; weights are loaded into copies of it.
        files: One safetensors file a member.
        seconds: Spent from the start network to all members.
        lengths: For a path, the Euclidean length walked to each member.
    """

    model: nn.Module
    files: list[Path]
    seconds: float
    lengths: list[float] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[nn.Module]:
        """The members in eval mode, each loaded as it is asked for."""
        for file in self.files:
            member = copy.deepcopy(self.model)
            member.load_state_dict(load_file(file))
            yield member.eval().requires_grad_(False)


def train_network(
    build: Build,
    task: Task,
    settings: Settings,
    *,
    augment: Augment | None,
    seed: int,
    progress: Progress = lambda steps, text: None,
) -> nn.Module:
    """A network trained from scratch by Adam on one cycle, in eval mode."""
    seed_everything(seed)
    model = build().to(task.train_inputs.device).to(memory_format=torch.channels_last)
    steps = settings.epochs * steps_an_epoch(task, settings.batch_size)
    batches = minibatches(task, batch_size=settings.batch_size, epochs=settings.epochs, seed=seed)
    train(
        model,
        ((augment(x), y) for x, y in batches) if augment else batches,
        *adam_one_cycle(model, lr=settings.lr, steps=steps),
        autocast=settings.autocast,
        after_step=lambda step: progress(1, "training"),
    )
    model.to(memory_format=torch.contiguous_format).eval()
    return model


def build_ensemble(
    way: str,
    start: nn.Module,
    build: Build,
    task: Task,
    settings: Settings,
    *,
    folder: Path,
    augment: Augment | None,
    distances: Sequence[float] = (),
    seed: int,
    progress: Progress = lambda steps, text: None,
) -> Ensemble:
    """Makes an ensemble.

    Args:
        way: Of ``WAYS``.
        start: The trained network; left as it is.
        build: Makes the architecture, newly initialised.
        task: What it was trained on.
        settings: How.
        folder: Where the members go; what an earlier run left there is written over.
        augment: What training from scratch sees of its inputs.
        distances: For weight noise, how far from the start network each member is.
        seed: Of everything drawn.
        progress: Called with the number of steps just taken and what is going on.

    Raises:
        ValueError: If there are fewer than two members, or an unknown way.
    """
    if settings.members < 2:
        raise ValueError(f"members: an ensemble has two or more, got {settings.members}.")
    if way not in WAYS:
        raise ValueError(f"way: {way!r} is unknown; choose from {', '.join(WAYS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    torch.manual_seed(seed)
    if WAYS[way].objective is not None:
        return _Walk(way, start, task, settings, folder, seed, progress).run()
    made = {
        "independent": lambda: _independent(build, task, settings, augment, seed, progress),
        "fge": lambda: _geometric(start, task, settings, augment, seed, progress),
        "distillation": lambda: _snapshots(start, task, settings, seed, progress),
        "noise": lambda: _noise(start, distances, seed),
    }[way]()
    seconds, files = 0.0, []
    begun = time.perf_counter()
    for k, state in enumerate(made):
        seconds += time.perf_counter() - begun
        files.append(folder / f"member-{k:03d}.safetensors")
        report.save_tensors(files[-1], state)
        begun = time.perf_counter()
    return Ensemble(start, files, seconds)


def steps_of(way: str, task: Task, settings: Settings) -> int:
    """How many steps an ensemble takes."""
    epoch = steps_an_epoch(task, settings.batch_size)
    objective = WAYS[way].objective
    if objective is not None:
        return sum(n for k in range(settings.members) for _, n in _phases(objective, settings, k))
    return {
        "independent": settings.members * settings.epochs * epoch,
        "fge": settings.members * _cycle(settings, epoch),
        "distillation": settings.members * _interval(settings, epoch),
        "noise": 0,
    }[way]


# --- functionally invariant paths -----------------------------------------------------------------------


def _phases(objective: str, settings: Settings, member: int) -> list[tuple[str, int]]:
    """What leads from the member before to this one, each with its steps."""
    straight, turn = (
        (settings.straight_away, settings.away)
        if member == 0
        else (settings.straight_between, settings.between)
    )
    if objective == "none":
        return [("straight", straight)]
    if objective == "both" and member == 0:
        return [("straight", straight), ("turn", turn)]
    return [("turn", turn)]


class _Walk:
    """One path through the members: far away first, then on from one to the next."""

    def __init__(
        self,
        way: str,
        start: nn.Module,
        task: Task,
        settings: Settings,
        folder: Path,
        seed: int,
        progress: Progress,
    ) -> None:
        self.begun = time.perf_counter()
        self.settings, self.folder = settings, folder
        self.objective = WAYS[way].objective or "none"
        self.start, self.task, self.progress = start, task, progress
        self.model = copy.deepcopy(start).eval()
        self.generator = torch.Generator().manual_seed(seed)
        inputs = task.train_inputs
        chosen = torch.randperm(len(inputs), generator=self.generator)[
            : settings.anchors or len(inputs)
        ]
        self.anchors = AnchorBatch(
            self.model,
            inputs[chosen.to(inputs.device)],
            output=settings.output_space,
            batch_size=min(settings.anchor_batch, len(chosen)),
            generator=self.generator,
        )
        self.files: list[Path] = []
        self.walked = 0.0

    def run(self) -> Ensemble:
        """Walks, and leaves each member in a file."""
        lengths = []
        optimizers = {"straight": self._straight(), "turn": self._turning()}
        for member in range(self.settings.members):
            likeness = self._likeness()
            for phase, steps in _phases(self.objective, self.settings, member):
                for t in range(steps):
                    # Where gradients are turned away, short steps before a member let it settle.
                    share = min(1.0, 2 * (1 - t / steps)) if phase == "turn" else 1.0
                    self._step(optimizers[phase], share, likeness if phase == "turn" else None)
            self.files.append(self.folder / f"member-{member:03d}.safetensors")
            report.save_tensors(self.files[-1], self.model.state_dict())
            lengths.append(self.walked)
        return Ensemble(self.start, self.files, time.perf_counter() - self.begun, lengths)

    def _straight(self) -> FIPOptimizer:
        """L = 0: as straight as the function allows."""
        settings = self.settings
        return FIPOptimizer(
            self.model.parameters(),
            self.anchors,
            eps=settings.straight_eps,
            solver=Solver(products=settings.straight_products),
            generator=self.generator,
        )

    def _turning(self) -> FIPOptimizer:
        """Towards input gradients that are unlike those of the other networks."""
        settings = self.settings
        return FIPOptimizer(
            self.model.parameters(),
            self.anchors,
            beta=settings.beta,
            eps=settings.eps,
            precondition="adam",
            generator=self.generator,
        )

    def _step(self, optimizer: FIPOptimizer, share: float, likeness: Diversity | None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = share * optimizer.defaults["lr"]
        optimizer.zero_grad()
        if likeness is not None:
            likeness().backward()
        optimizer.step()
        assert optimizer.last_step is not None
        self.walked += optimizer.last_step.step_norm
        self.progress(1, f"drift {optimizer.last_step.drift:.3g}")

    def _likeness(self) -> Diversity:
        """Of input gradients to those of the start network and of some earlier members."""
        drawn = torch.randperm(len(self.files), generator=self.generator)[: self.settings.others]
        references = [self.start]
        for k in drawn.tolist():
            references.append(copy.deepcopy(self.start))
            references[-1].load_state_dict(load_file(self.files[k]))
        batches = _Batches(self.task, self.settings, self.generator)
        return Diversity(self.model, references, batches)


class _Batches:
    """Training inputs with some noise, and their labels, drawn anew for each pass."""

    def __init__(self, task: Task, settings: Settings, generator: torch.Generator) -> None:
        self.task, self.settings, self.generator = task, settings, generator
        self.std = torch.tensor(DATASETS[task.name].std).view(-1, 1, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, size = self.task.train_inputs, self.settings.diversity_batch
        for part in torch.randperm(len(inputs), generator=self.generator).split(size):
            chosen = part.to(inputs.device)
            x = inputs[chosen]
            if self.settings.noise > 0:
                drawn = 2 * torch.rand(x.shape, generator=self.generator).to(x) - 1
                x = x + self.settings.noise / self.std.to(x) * drawn
            yield x, self.task.train_labels[chosen]


# --- the other ways -------------------------------------------------------------------------------------


def _independent(
    build: Build,
    task: Task,
    settings: Settings,
    augment: Augment | None,
    seed: int,
    progress: Progress,
) -> Iterator[dict[str, Tensor]]:
    for k in range(settings.members):
        # Seeds far from those of the start networks.
        yield train_network(
            build, task, settings, augment=augment, seed=1000 * (seed + 1) + k, progress=progress
        ).state_dict()


def _cycle(settings: Settings, epoch: int) -> int:
    return max(2, round(settings.cycle_epochs * epoch))


def _geometric(
    start: nn.Module,
    task: Task,
    settings: Settings,
    augment: Augment | None,
    seed: int,
    progress: Progress,
) -> Iterator[dict[str, Tensor]]:
    """Fast geometric ensembling (Garipov et al., 2018): SGD, a network each time its learning rate is lowest."""
    model = copy.deepcopy(start)
    cycle = _cycle(settings, steps_an_epoch(task, settings.batch_size))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.cycle_lr, momentum=0.9, weight_decay=5e-4
    )

    def share(step: int) -> float:
        at = (step % cycle) / cycle  # from the lowest rate up to the highest and down again
        return 0.01 + 0.99 * (1 - abs(2 * at - 1))

    scheduler = LambdaLR(optimizer, share)
    epochs = math.ceil(settings.members * settings.cycle_epochs) + 1
    batches = minibatches(task, batch_size=settings.batch_size, epochs=epochs, seed=seed)
    for _ in range(settings.members):
        taken = ((augment(x), y) if augment else (x, y) for x, y in _first(batches, cycle))
        train(
            model,
            taken,
            optimizer,
            scheduler,
            autocast=settings.autocast,
            after_step=lambda step: progress(1, "cycle"),
        )
        yield copy.deepcopy(model.state_dict())


def _interval(settings: Settings, epoch: int) -> int:
    return max(1, round(settings.snapshot_epochs * epoch))


def _snapshots(
    start: nn.Module, task: Task, settings: Settings, seed: int, progress: Progress
) -> Iterator[dict[str, Tensor]]:
    """Adam on the likeness of input gradients to the start network's, and on the squared change of the outputs."""
    model = copy.deepcopy(start).eval()
    generator = torch.Generator().manual_seed(seed)
    interval = _interval(settings, steps_an_epoch(task, settings.batch_size))
    epochs = math.ceil(settings.members * settings.snapshot_epochs) + 1
    batches = minibatches(task, batch_size=settings.batch_size, epochs=epochs, seed=seed)
    likeness = Diversity(model, start, _Batches(task, settings, generator))
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.snapshot_lr)
    reference = copy.deepcopy(start).eval().requires_grad_(False)
    for _ in range(settings.members):
        for inputs, _labels in _first(batches, interval):
            optimizer.zero_grad()
            with torch.no_grad():
                held = reference(inputs)
            change = squared_distance(model(inputs), held).mean()
            (likeness() + settings.snapshot_strength * change).backward()
            optimizer.step()
            progress(1, "snapshots")
        yield copy.deepcopy(model.state_dict())


def _noise(start: nn.Module, distances: Sequence[float], seed: int) -> Iterator[dict[str, Tensor]]:
    """The start network moved in random directions, as far as told."""
    generator = torch.Generator().manual_seed(seed)
    for distance in distances:
        model = copy.deepcopy(start)
        parameters = list(model.parameters())
        drawn = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        size = math.sqrt(sum(float(d.square().sum()) for d in drawn))
        with torch.no_grad():
            for p, d in zip(parameters, drawn, strict=True):
                p.add_(d, alpha=distance / size)
        yield model.state_dict()


def _first(batches: Iterator[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(count):
        yield next(batches)
