"""What a fix starts from: the network, its wrong inputs, and the inputs that tell what else has changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recipes.common.augment import Augment
from recipes.common.data import DataError, Task
from recipes.common.training import outputs
from recipes.hotfix.settings import HotfixSettings

# The share of the held-out inputs from which unseen inputs are drawn. It is the same in every run, so that settings can
# be chosen on the others.
RESERVED = 0.4
_RESERVING_SEED = 0
AT_ONCE = 500  # inputs evaluated at a time


@dataclass(frozen=True)
class Case:
    """What a method is given.

    Attributes:
        old: The trained network, in eval mode; left as it is.
        wrong_inputs: The inputs that it gets wrong.
        wrong_labels: Their right classes.
        anchors: Training inputs without labels.
        check: Inputs without labels on which the budget counts.
        augment: Changes the anchors of a step; None leaves them as they are.
    """

    old: nn.Module
    wrong_inputs: Tensor
    wrong_labels: Tensor
    anchors: Tensor
    check: Tensor
    augment: Augment | None

    def augmented(self, inputs: Tensor) -> Tensor:
        """The inputs as a step sees them."""
        return inputs if self.augment is None else self.augment(inputs)


@dataclass(frozen=True)
class Unseen:
    """Inputs that no method is given, with their labels."""

    inputs: Tensor
    labels: Tensor


def with_held_out(task: Task, share: float) -> Task:
    """The task with a share of the training inputs moved to the test inputs: all inputs that no training sees."""
    if share == 0:
        return task
    part = task.held_out(share)
    return dataclasses.replace(
        part,
        test_inputs=torch.cat([part.test_inputs, task.test_inputs]),
        test_labels=torch.cat([part.test_labels, task.test_labels]),
    )


def check_sizes(task: Task, settings: HotfixSettings, *, development: bool) -> None:
    """Refuses more inputs than there are, by the name of the option.

    Raises:
        DataError: If there are too few inputs.
    """
    reserved, others = (len(part) for part in _reserved(task))
    wanted = settings.check + settings.wrong + (settings.unseen if development else 0)
    for name, asked, there, what in (
        ("anchors", settings.anchors, len(task.train_inputs), "training inputs"),
        ("anchor-batch", settings.anchor_batch, settings.anchors, "anchors"),
        ("unseen", settings.unseen, others if development else reserved, "inputs kept for this"),
        ("check", wanted, others, "held-out inputs for it and the wrong ones"),
    ):
        if asked > there:
            raise DataError(f"argument --{name}: {asked} is more than the {there} {what}")


def draw(
    old: nn.Module,
    task: Task,
    settings: HotfixSettings,
    *,
    augment: Augment | None,
    development: bool,
    seed: int,
) -> tuple[Case, Unseen]:
    """Draws the inputs of a seed; the four sets have no input in common.

    Args:
        old: The trained network, in eval mode.
        task: The data; its test inputs are those that the network was not trained on.
        settings: The settings.
        augment: Changes the anchors of a step.
        development: Whether the inputs kept for the results are left alone, and others take their place.
        seed: The seed of the draw.

    Raises:
        DataError: If the network gets too few inputs wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    reserved, others = _reserved(task)
    reserved = reserved[torch.randperm(len(reserved), generator=generator)]
    others = others[torch.randperm(len(others), generator=generator)]
    if development:
        reserved, others = others[: settings.unseen], others[settings.unseen :]
    unseen, check = reserved[: settings.unseen], others[: settings.check]
    rest = others[settings.check :]
    wrong = _wrong(old, task, rest, settings.wrong)
    anchors = torch.randperm(len(task.train_inputs), generator=generator)[: settings.anchors]
    case = Case(
        old,
        task.test_inputs[wrong],
        task.test_labels[wrong],
        task.train_inputs[anchors],
        task.test_inputs[check],
        augment,
    )
    return case, Unseen(task.test_inputs[unseen], task.test_labels[unseen])


def _reserved(task: Task) -> tuple[Tensor, Tensor]:
    """The indices of the test inputs kept for the results, and of the others."""
    count = len(task.test_inputs)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_RESERVING_SEED))
    kept = round(RESERVED * count)
    return order[:kept], order[kept:]


def _wrong(old: nn.Module, task: Task, among: Tensor, count: int) -> Tensor:
    """The first ``count`` of these test inputs that the network gets wrong."""
    found, number = list[Tensor](), 0
    for rows in among.split(AT_ONCE):
        if number >= count:
            break
        guessed = outputs(old, task.test_inputs[rows], AT_ONCE).argmax(dim=1)
        found.append(rows[(guessed != task.test_labels[rows]).cpu()])
        number += len(found[-1])
    if number < count:
        raise DataError(
            f"argument --wrong: the network gets only {number} of {len(among)} held-out inputs wrong, "
            f"and {count} are asked for"
        )
    return torch.cat(found)[:count]
