"""The settings of ``recipes.split_tasks``, and their defaults for each data set and budget."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Literal

from fipoptim.anchors.held_outputs import OutputRange
from recipes.common.data import Task
from recipes.common.options import COUNT, RATE
from recipes.common.settings import option
from recipes.continual.methods.dark_experience import DarkExperienceOptions
from recipes.continual.methods.distillation import DistillationOptions
from recipes.continual.methods.distillation_muon import MuonOptions
from recipes.continual.methods.ewc import EWCOptions
from recipes.continual.methods.fip import PathOptions
from recipes.continual.methods.gem import GEMOptions
from recipes.continual.methods.lwf import LwFOptions
from recipes.continual.methods.plain import AdamOptions
from recipes.continual.methods.replay import ReplayOptions
from recipes.continual.settings import ContinualSettings


@dataclass(frozen=True, kw_only=True)
class SplitTasksSettings(ContinualSettings):
    """How the tasks are learnt; every field made by ``option`` is an option of the command line.

    Attributes:
        first_epochs: Passes over the first task, which all methods start from.
        epochs: Passes of the path over each later task.
        baseline_epochs: The same for the other methods, which get as much time as the path or more.
        batch_size: Inputs of a training step.
        first_lr: Adam's highest learning rate on the first task.
        loss_over: Whether the loss is among the classes of the task being learnt, or all of the head.
        shift: Whether the batches are shifted (and flipped, for photographs).
        hold: The outputs that are held on a remembered input: all of the head, those of the classes that were known
            when it was learnt, or those of its own task.
        batch_norm: ``"frozen"``: batch norm layers keep the statistics of the first task and normalise by them.
            ``"batch"``: they normalise by each batch, and a network is tested with statistics that are measured on
            remembered inputs of all tasks so far.
    """

    first_epochs: int = option("epochs on the first task", **COUNT)
    epochs: int = option("epochs of the path on each later task", **COUNT)
    baseline_epochs: int = option("the same for the other methods", **COUNT)
    batch_size: int = option("inputs of a training step", **COUNT)
    first_lr: float = option("Adam's highest learning rate on the first task", default=3e-3, **RATE)
    loss_over: str = option(
        "classes in the loss: the task's or all", default="task", choices=["task", "all"]
    )
    shift: bool = option(
        "shift (and flip) the batches", default=False, action=argparse.BooleanOptionalAction
    )
    hold: Literal["all", "known", "task"] = option(
        "outputs held on a remembered input: all, those of known classes, or of its own task",
        default="known",
        choices=["all", "known", "task"],
    )
    batch_norm: Literal["frozen", "batch"] = option(
        "normalise by the first task's statistics, or by each batch's",
        default="batch",
        choices=["frozen", "batch"],
    )

    def held_outputs(self, task: Task, head: int) -> OutputRange:
        """The range of outputs that are held on inputs of a task, for a head of ``head`` outputs."""
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
    shift=True,
    methods={
        "fip": PathOptions(
            beta=10.0, eps=2.0, momentum=0.8, precondition="muon", max_products=8, radius=10.0
        ),
        "naive": AdamOptions(lr=3e-3),
        "distillation": DistillationOptions(lr=3e-3, strength=0.1, momentum=0.5),
        "distillation-muon": MuonOptions(lr=6e-3, strength=0.1),
        "dark-experience": DarkExperienceOptions(lr=3e-3, strength=0.1, momentum=0.5),
        "replay": ReplayOptions(lr=3e-3, strength=1.0),
        "ewc": EWCOptions(lr=1e-3, strength=1e4),
        "gem": GEMOptions(lr=3e-3, strength=0.5),
        "lwf": LwFOptions(lr=1e-3, strength=1.0),
    },
)
DEFAULTS = {
    ("digits", "short"): SplitTasksSettings(
        anchors=40,
        first_epochs=20,
        epochs=20,
        baseline_epochs=40,
        batch_size=32,
        methods={
            "fip": PathOptions(beta=10.0, eps=0.8, max_products=8),
            "naive": AdamOptions(lr=3e-3),
            "distillation": DistillationOptions(lr=3e-3, strength=0.1),
            "distillation-muon": MuonOptions(lr=3e-3, strength=0.1),
            "replay": ReplayOptions(lr=3e-3, strength=1.0),
            "ewc": EWCOptions(lr=3e-3, strength=100.0),
            "gem": GEMOptions(lr=3e-3, strength=0.5),
            "lwf": LwFOptions(lr=3e-3, strength=1.0),
        },
    ),
    ("cifar100", "short"): _CIFAR100,
    # For a GPU: there a network this small takes no longer for five times as many images at once, and a step of the
    # path takes three times as long as a step of another method, because it launches more kernels.
    ("cifar100", "full"): dataclasses.replace(
        _CIFAR100,
        anchor_batch=250,
        batch_size=250,
        first_epochs=60,
        epochs=18,
        baseline_epochs=54,
        # In a run of this length distillation gains nothing from less momentum.
        methods={**_CIFAR100.methods, "distillation": DistillationOptions(lr=3e-3, strength=0.1)},
    ),
}
