"""The settings of ``recipes.split_tasks``, and their defaults for each data set and budget."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from recipes.common.data import Task
from recipes.continual import learners
from recipes.continual.known_outputs import Held
from recipes.continual.learners import Tuning


@dataclass(frozen=True, kw_only=True)
class SplitTasksSettings(learners.Settings):
    """What may be tuned; every field is an option of the command line.

    Attributes:
        first_epochs: Passes over the first task, which all methods start from.
        epochs: Passes of the path over each later task.
        baseline_epochs: The same for the other methods, which get as much time as the path or more.
        batch_size: Inputs of a training step.
        first_lr: Adam's highest learning rate on the first task.
        loss_over: Whether the loss is among the classes of the task being learnt, or all of the head.
        shift: Whether the batches are shifted (and flipped, for photographs).
        hold: Which outputs are held on a remembered input, where outputs are: all of the head, those of the classes
            known when it was learnt, or those of its own task.
        batch_norm: Whether batch norm layers keep the statistics of the first task and normalise by them, or normalise
            by each batch on the way; the network is then tested with statistics of remembered inputs of all tasks so
            far.
    """

    first_epochs: int
    epochs: int
    baseline_epochs: int
    batch_size: int
    first_lr: float = 3e-3
    loss_over: str = "task"
    shift: bool = False
    hold: Literal["all", "known", "task"] = "known"
    batch_norm: Literal["frozen", "batch"] = "batch"

    def held(self, task: Task, head: int) -> Held:
        """The range of outputs that are held on inputs of a task, for a head of so many."""
        first, end = task.class_range
        return {"all": (0, head), "known": (0, end), "task": (first, end)}[self.hold]

    def epochs_of(self, method: str) -> int:
        """Passes of a method over each task after the first."""
        return self.epochs if method == "fip" else self.baseline_epochs


# For each data set: the classes of a task, and the defaults by budget.
CLASSES = {"digits": 2, "cifar100": 5}
_CIFAR100 = SplitTasksSettings(
    anchors=500,
    anchor_batch=50,
    first_epochs=10,
    epochs=3,
    baseline_epochs=4,
    batch_size=50,
    beta=10.0,
    eps=2.0,
    momentum=0.8,
    precondition="muon",
    max_products=8,
    radius=10.0,
    shift=True,
    tuning={
        "naive": Tuning(3e-3),
        "distillation": Tuning(3e-3, 0.1, momentum=0.5),
        "distillation-muon": Tuning(6e-3, 0.1),
        "replay": Tuning(3e-3, 1.0),
        "ewc": Tuning(1e-3, 1e4),
        "gem": Tuning(3e-3, 0.5),
        "lwf": Tuning(1e-3, 1.0),
    },
)
DEFAULTS = {
    ("digits", "short"): SplitTasksSettings(
        anchors=40,
        first_epochs=20,
        epochs=20,
        baseline_epochs=40,
        batch_size=32,
        beta=10.0,
        eps=0.8,
        max_products=8,
        tuning={
            "naive": Tuning(3e-3),
            "distillation": Tuning(3e-3, 0.1),
            "distillation-muon": Tuning(3e-3, 0.1),
            "replay": Tuning(3e-3, 1.0),
            "ewc": Tuning(3e-3, 100.0),
            "gem": Tuning(3e-3, 0.5),
            "lwf": Tuning(3e-3, 1.0),
        },
    ),
    ("cifar100", "short"): _CIFAR100,
    # For a GPU, where a network this small takes no longer for five times as many images at once, and a step of the
    # path three times as long as the others' for its launches.
    ("cifar100", "full"): dataclasses.replace(
        _CIFAR100,
        anchor_batch=250,
        batch_size=250,
        first_epochs=60,
        epochs=18,
        baseline_epochs=54,
        # Less momentum gains distillation nothing at this length.
        tuning={**_CIFAR100.tuning, "distillation": Tuning(3e-3, 0.1)},
    ),
}
