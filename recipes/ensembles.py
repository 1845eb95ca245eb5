"""Several networks from one: by walking along functionally invariant paths, and as others make ensembles.

Every way leaves its members as files in a folder, so that however many there are, one is in memory at a time.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.anchors import squared_distance
from fipoptim.output_space import output_map
from fipoptim.secondary import Diversity
from recipes import report
from recipes.augment import Augment
from recipes.batch_statistics import by_batch, with_statistics
from recipes.data import DATASETS, Task
from recipes.memory import give_back
from recipes.training import adam_one_cycle, minibatches, seed_everything, steps_an_epoch, train
from recipes.withstand import Withstand

SPENT = "seconds.json"  # beside the members
AT_ONCE = 500  # inputs whose outputs are computed at a time, where they are many
GIVE_BACK_EVERY = 100  # steps
MEASURED = 100  # batches of an objective's size that a member's running statistics are measured on

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
        autocast: Whether minibatches and the attacks to withstand run in bfloat16; what holds the function never does.
        anchors: How many training inputs hold the function; None is all.
        anchor_batch: How many of them each step of a path sees, drawn anew.
        straight_eps: Length of a step of a path without objective.
        straight_away: Steps of it to the first member, or to where gradients begin to turn.
        straight_between: Steps of it from one member to the next.
        straight_products: Metric products of each.
        eps: Length of a step on an objective, or back to the function, in Adam's geometry; falls before each member.
        away: Steps of that to the first member.
        between: Steps of that from one member to the next.
        between_share: Of the length of a step (or of the learning rate), there.
        beta: Weight of the likeness of input gradients against the squared output change.
        withstand_beta: Weight of what attacks change, in its place.
        withstand_eps: Largest change of a pixel by these attacks.
        output_space: In which the function is held.
        batch_statistics: Whether batch norm layers normalise by each batch on the way, as in training.
        objective_batch: Inputs of an objective, each step.
        noise: Largest change of a pixel by noise in inputs whose gradients are compared.
        others: Earlier members that a member is to differ from beside the start network, at most.
        distillation_lr: Adam's highest learning rate on the same objectives.
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
    eps: float = 1.5
    away: int = 1000
    between: int = 120
    between_share: float = 1.0
    beta: float = 0.004
    withstand_beta: float = 0.3
    withstand_eps: float = 0.1
    output_space: str = "probabilities"
    batch_statistics: bool = False
    objective_batch: int = 64
    noise: float = 0.0
    others: int = 2
    distillation_lr: float = 1e-3
    cycle_epochs: float = 2.0
    cycle_lr: float = 0.02


Objective = Literal["misalign", "withstand"]


@dataclass(frozen=True)
class Way:
    """A way to an ensemble.

    Attributes:
        title: What tables and plots call it.
        path: Whether it is a functionally invariant path.
        straight: Whether that begins with a walk as straight as the function allows.
        objective: What it minimises besides keeping the function: likeness of input gradients, or what attacks change.
    """

    title: str
    path: bool = False
    straight: bool = False
    objective: Objective | None = None


WAYS = {
    "none": Way("path, L = 0", path=True, straight=True),
    "misalign": Way("path, misaligned", path=True, objective="misalign"),
    "both": Way("path, both", path=True, straight=True, objective="misalign"),
    "withstand": Way("path, withstanding", path=True, objective="withstand"),
    "independent": Way("independent"),
    "fge": Way("fast geometric"),
    "distillation": Way("distilled, misaligned", objective="misalign"),
    "adversarial": Way("distilled, withstanding", objective="withstand"),
    "noise": Way("weight noise"),
}
PATHS = tuple(name for name, way in WAYS.items() if way.path)
BASELINES = tuple(name for name, way in WAYS.items() if not way.path)


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
    """A network trained from scratch by Adam on one cycle, in eval mode; in channels-last layout, as its copies are."""
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
    return model.eval()


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
    resume: bool = False,
    progress: Progress = lambda steps, text: None,
) -> Ensemble:
    """Makes an ensemble.

    Args:
        way: Of ``WAYS``.
        start: The trained network; left as it is.
        build: Makes the architecture, newly initialised.
        task: What it was trained on.
        settings: How.
        folder: Where the members go; what an earlier run left there is written over, but for ``resume``.
        augment: What training sees of its inputs; what holds the function, and objectives, see the same.
        distances: For weight noise, how far from the start network each member is.
        seed: Of everything drawn.
        resume: Keep the independent networks that an interrupted run with the same settings left in ``folder``.
        progress: Called with the number of steps just taken and what is going on.

    Raises:
        ValueError: If there are fewer than two members, or an unknown way.
    """
    if settings.members < 2:
        raise ValueError(f"members: an ensemble has two or more, got {settings.members}.")
    if way not in WAYS:
        raise ValueError(f"way: {way!r} is unknown; choose from {', '.join(WAYS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    spent = _spent(folder) if resume and way == "independent" else []
    files = [_member(folder, k) for k in range(len(spent))]
    for old in {*folder.glob("*.safetensors"), folder / SPENT}.difference(files):
        old.unlink(missing_ok=True)
    torch.manual_seed(seed)
    if WAYS[way].path:
        return _Walk(WAYS[way], start, task, settings, folder, augment, seed, progress).run()

    def distilled() -> Iterator[dict[str, Tensor]]:
        return _distilled(way, start, task, settings, files, augment, seed, progress)

    made = {
        "independent": lambda: _independent(
            build, task, settings, augment, seed, len(spent), progress
        ),
        "fge": lambda: _geometric(start, task, settings, augment, seed, progress),
        "distillation": distilled,
        "adversarial": distilled,
        "noise": lambda: _noise(start, distances, seed),
    }[way]()
    begun = time.perf_counter()
    for state in made:
        spent.append(time.perf_counter() - begun)
        files.append(_member(folder, len(files)))
        report.save_tensors(files[-1], state)
        report.write_json(folder / SPENT, {"seconds": spent})
        begun = time.perf_counter()
    return Ensemble(start, files, sum(spent))


def _member(folder: Path, k: int) -> Path:
    return folder / f"member-{k:03d}.safetensors"


def _spent(folder: Path) -> list[float]:
    """Seconds that an interrupted run spent on each member it has left."""
    found = report.read_json(folder / SPENT)
    return found["seconds"] if found else []


def steps_of(way: str, task: Task, settings: Settings) -> int:
    """How many steps an ensemble takes."""
    epoch = steps_an_epoch(task, settings.batch_size)
    if WAYS[way].path or WAYS[way].objective is not None:
        phases = (_phases(WAYS[way], settings, k) for k in range(settings.members))
        return sum(n for phase in phases for _, n in phase)
    return {
        "independent": settings.members * settings.epochs * epoch,
        "fge": settings.members * _cycle(settings, epoch),
        "noise": 0,
    }[way]


def _phases(way: Way, settings: Settings, member: int) -> list[tuple[str, int]]:
    """What leads from the member before to this one, each with its steps."""
    first = member == 0
    straight = settings.straight_away if first else settings.straight_between
    turn = settings.away if first else settings.between
    # Where gradients are turned away later on, the straight walk is only the way there.
    if way.straight and (first or way.objective is None):
        return [("straight", straight), ("turn", turn)]
    return [("turn", turn)]


def _share(settings: Settings, member: int, step: int, steps: int) -> float:
    """Of the length of a step, or of the learning rate: falls to nothing before a member, so that it settles."""
    most = 1.0 if member == 0 else settings.between_share
    return most * min(1.0, 2 * (1 - step / steps))


# --- what is minimised -----------------------------------------------------------------------------------


def _objective(
    way: Way,
    model: nn.Module,
    start: nn.Module,
    files: Sequence[Path],
    task: Task,
    settings: Settings,
    augment: Augment | None,
    generator: torch.Generator,
) -> Callable[[], Tensor] | None:
    """What the next member is to be: unlike the start network and some of the earlier members, in ``files``."""
    if way.objective is None:
        return None
    drawn = torch.randperm(len(files), generator=generator)[: settings.others]
    others = []
    for k in drawn.tolist():
        others.append(copy.deepcopy(start))
        others[-1].load_state_dict(load_file(files[k]))
    batches = _Batches(task, settings, augment, generator, noisy=way.objective == "misalign")
    if way.objective == "misalign":
        return Diversity(model, [start, *others], batches)
    return Withstand(
        model,
        start,
        others,
        batches,
        info=DATASETS[task.name],
        eps=settings.withstand_eps,
        generator=generator,
        autocast=settings.autocast,
    )


def _mover(start: nn.Module, settings: Settings) -> nn.Module:
    """The copy of the start network that moves."""
    return by_batch(start) if settings.batch_statistics else copy.deepcopy(start).eval()


def _arrived(
    model: nn.Module,
    start: nn.Module,
    task: Task,
    settings: Settings,
    augment: Augment | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The member that the network which moves is by now."""
    if not settings.batch_statistics:
        return copy.deepcopy(model.state_dict())
    batches = _Batches(task, settings, augment, generator, noisy=False)
    some = (x for x, _ in islice(batches, MEASURED))
    return with_statistics(model, start, some).state_dict()


def _weight(way: Way, settings: Settings) -> float:
    """What the objective counts against the squared output change."""
    return settings.withstand_beta if way.objective == "withstand" else settings.beta


class _Batches:
    """Training inputs, with some noise if asked for, and their labels, drawn anew for each pass."""

    def __init__(
        self,
        task: Task,
        settings: Settings,
        augment: Augment | None,
        generator: torch.Generator,
        *,
        noisy: bool,
    ) -> None:
        self.task, self.size, self.generator = task, settings.objective_batch, generator
        self.augment = augment
        self.noise = settings.noise if noisy else 0.0
        self.std = torch.tensor(DATASETS[task.name].std).view(-1, 1, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs = self.task.train_inputs
        for part in torch.randperm(len(inputs), generator=self.generator).split(self.size):
            chosen = part.to(inputs.device)
            x = inputs[chosen]
            if self.augment is not None:
                x = self.augment(x)
            if self.noise > 0:
                drawn = 2 * torch.rand(x.shape, generator=self.generator).to(x) - 1
                x = x + self.noise / self.std.to(x) * drawn
            yield x, self.task.train_labels[chosen]


# --- functionally invariant paths -----------------------------------------------------------------------


class _Walk:
    """One path through the members: far away first, then on from one to the next."""

    def __init__(
        self,
        way: Way,
        start: nn.Module,
        task: Task,
        settings: Settings,
        folder: Path,
        augment: Augment | None,
        seed: int,
        progress: Progress,
    ) -> None:
        self.begun = time.perf_counter()
        self.settings, self.folder, self.augment = settings, folder, augment
        self.way, self.start, self.task, self.progress = way, start, task, progress
        self.model = _mover(start, settings)
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
            chunk_size=max(AT_ONCE, settings.anchor_batch),
            augment=augment,
            generator=self.generator,
        )
        self.files: list[Path] = []
        self.walked = 0.0

    def run(self) -> Ensemble:
        """Walks, and leaves each member in a file."""
        lengths = []
        optimizers = {"straight": self._straight(), "turn": self._turning()}
        for member in range(self.settings.members):
            objective = _objective(
                self.way,
                self.model,
                self.start,
                self.files,
                self.task,
                self.settings,
                self.augment,
                self.generator,
            )
            for phase, steps in _phases(self.way, self.settings, member):
                optimizer = optimizers[phase]
                for t in range(steps):
                    optimizer.zero_grad()
                    if phase == "turn":
                        self._turn(optimizer, objective, _share(self.settings, member, t, steps))
                    optimizer.step()
                    assert optimizer.last_step is not None
                    self.walked += optimizer.last_step.step_norm
                    if t % GIVE_BACK_EVERY == 0:
                        give_back()
                    self.progress(1, f"drift {optimizer.last_step.drift:.3g}")
            self.files.append(_member(self.folder, member))
            report.save_tensors(
                self.files[-1],
                _arrived(
                    self.model, self.start, self.task, self.settings, self.augment, self.generator
                ),
            )
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
        """Towards the objective; without one, back to the function.

        First-order steps: over so many, with a new batch each, products are not worth their time.
        """
        return FIPOptimizer(
            self.model.parameters(),
            self.anchors,
            beta=_weight(self.way, self.settings),
            eps=self.settings.eps,
            momentum=0.9,
            precondition="adam",
            solver=Solver(products=0),
            generator=self.generator,
        )

    def _turn(
        self, optimizer: FIPOptimizer, objective: Callable[[], Tensor] | None, share: float
    ) -> None:
        """The length and the gradient of a step; one of zero lets it restore the function alone."""
        for group in optimizer.param_groups:
            group["lr"] = share * optimizer.defaults["lr"]
        if objective is not None:
            objective().backward()
        else:
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)


# --- the other ways -------------------------------------------------------------------------------------


def _independent(
    build: Build,
    task: Task,
    settings: Settings,
    augment: Augment | None,
    seed: int,
    first: int,
    progress: Progress,
) -> Iterator[dict[str, Tensor]]:
    """Members from the ``first`` on, each trained from scratch with a seed of its own."""
    for k in range(first, settings.members):
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


def _distilled(
    name: str,
    start: nn.Module,
    task: Task,
    settings: Settings,
    files: Sequence[Path],
    augment: Augment | None,
    seed: int,
    progress: Progress,
) -> Iterator[dict[str, Tensor]]:
    """Adam on what the path of the same objective minimises, in as many steps; ``files`` grows as members are saved."""
    way = WAYS[name]
    model = _mover(start, settings)
    reference = copy.deepcopy(start).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.distillation_lr)
    space = output_map(settings.output_space)
    held = len(task.train_inputs) if settings.anchors is None else settings.anchors
    for member in range(settings.members):
        objective = _objective(way, model, start, files, task, settings, augment, generator)
        assert objective is not None
        ((_, steps),) = _phases(way, settings, member)
        for t in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.distillation_lr * _share(settings, member, t, steps)
            chosen = torch.randint(held, (settings.anchor_batch,), generator=generator)
            inputs = task.train_inputs[chosen.to(task.train_inputs.device)]
            if augment is not None:
                inputs = augment(inputs)
            optimizer.zero_grad()
            with torch.no_grad():
                kept = space(reference(inputs))
            change = squared_distance(space(model(inputs)), kept).mean()
            (_weight(way, settings) * objective() + change).backward()
            optimizer.step()
            if t % GIVE_BACK_EVERY == 0:
                give_back()
            progress(1, "distillation")
        yield _arrived(model, start, task, settings, augment, generator)


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
