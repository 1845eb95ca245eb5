"""The ways to several networks from one, and what may be tuned about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.common.data import Task
from recipes.common.training import steps_an_epoch


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


def steps_of(way: str, task: Task, settings: Settings) -> int:
    """How many steps an ensemble takes."""
    epoch = steps_an_epoch(task, settings.batch_size)
    if WAYS[way].path or WAYS[way].objective is not None:
        return sum(n for k in range(settings.members) for _, n in phases(WAYS[way], settings, k))
    return {
        "independent": settings.members * settings.epochs * epoch,
        "fge": settings.members * cycle(task, settings),
        "noise": 0,
    }[way]


def phases(way: Way, settings: Settings, member: int) -> list[tuple[str, int]]:
    """What leads from the member before to this one, each with its steps."""
    first = member == 0
    straight = settings.straight_away if first else settings.straight_between
    turn = settings.away if first else settings.between
    # Where gradients are turned away later on, the straight walk is only the way there.
    if way.straight and (first or way.objective is None):
        return [("straight", straight), ("turn", turn)]
    return [("turn", turn)]


def share(settings: Settings, member: int, step: int, steps: int) -> float:
    """Of the length of a step, or of the learning rate: falls to nothing before a member, so that it settles."""
    most = 1.0 if member == 0 else settings.between_share
    return most * min(1.0, 2 * (1 - step / steps))


def weight(way: Way, settings: Settings) -> float:
    """What the objective counts against the squared output change."""
    return settings.withstand_beta if way.objective == "withstand" else settings.beta


def cycle(task: Task, settings: Settings) -> int:
    """Steps from one network of fast geometric ensembling to the next."""
    return max(2, round(settings.cycle_epochs * steps_an_epoch(task, settings.batch_size)))
