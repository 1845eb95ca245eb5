"""What an update starts from: the old network, labelled inputs of all classes, and what the old network gets right."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from recipes.common.augment import Augment
from recipes.common.data import DataError, Task, split
from recipes.common.training import outputs
from recipes.update.head import quiet_bias, with_more_classes
from recipes.update.learning import Trained

AT_ONCE = 500  # inputs evaluated at a time


@dataclass(frozen=True)
class Parts:
    """A data set in its parts.

    Attributes:
        old: The old classes, without the inputs that are held out.
        all: All classes, without these.
        held_inputs: The inputs of old classes that are held out.
        held_labels: Their labels.
    """

    old: Task
    all: Task
    held_inputs: Tensor
    held_labels: Tensor


def divide(task: Task, held_out: float, *, seed: int) -> Parts:
    """Divides a data set: the first half of its classes are the old ones, and a share of their inputs is held out."""
    old, new = split(task, task.classes // 2)
    part = old.held_out(held_out, seed=seed)
    old = dataclasses.replace(part, test_inputs=old.test_inputs, test_labels=old.test_labels)
    everything = dataclasses.replace(
        task,
        train_inputs=torch.cat([old.train_inputs, new.train_inputs]),
        train_labels=torch.cat([old.train_labels, new.train_labels]),
    )
    return Parts(old, everything, part.test_inputs, part.test_labels)


@dataclass(frozen=True)
class Case:
    """What a method is given. An input of an old class that the old network gets right is **right** here.

    Attributes:
        old: The old network among all classes, of which the new ones have probability 0; in eval mode, left as it is.
        start: The old network with a head of all classes, which predicts what the old one does; left as it is.
        task: Labelled training inputs of all classes. Its test inputs are for measuring alone.
        old_classes: The number of old classes; they come first.
        right: Training inputs that are right. They need no labels any more.
        check: Held-out inputs that are right, on which budgets count.
        augment: Changes the labelled inputs of a step; None leaves them as they are.
        plain: What plain training has come to, once it is known; other methods start from it.
    """

    old: nn.Module
    start: nn.Module
    task: Task
    old_classes: int
    right: Tensor
    check: Tensor
    augment: Augment | None
    plain: list[Trained] = field(default_factory=list)


def make_case(old: nn.Module, parts: Parts, augment: Augment | None) -> Case:
    """The case of an old network, in eval mode.

    Raises:
        DataError: If the old network gets no held-out input right.
    """
    old_classes, classes = parts.old.classes, parts.all.classes
    z = outputs(old, parts.old.train_inputs, AT_ONCE)
    held = outputs(old, parts.held_inputs, AT_ONCE)
    right = z.argmax(dim=1) == parts.old.train_labels
    check = held.argmax(dim=1) == parts.held_labels
    if not bool(check.any()):
        raise DataError(
            f"argument --old-epochs: the old network gets none of {len(check)} held-out inputs right"
        )
    bias = quiet_bias(torch.cat([z[right], held[check]]), classes - old_classes)
    return Case(
        with_more_classes(old, classes, -math.inf).requires_grad_(False),
        with_more_classes(old, classes, bias),
        parts.all,
        old_classes,
        parts.old.train_inputs[right],
        parts.held_inputs[check],
        augment,
    )
