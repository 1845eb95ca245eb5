"""One method on a sequence of tasks: learn, be tested on the way, remember, and so on; resumable after every task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipoptim import AnchorBatch
from recipes import learners
from recipes.augment import Augment
from recipes.data import Task
from recipes.learners import Learner, Loss
from recipes.memory import PeakMemory
from recipes.progress import Progress
from recipes.report import replace
from recipes.training import accuracy, minibatches, scores, steps_an_epoch

TESTED_STEPS = (1, 3, 10)  # of each task, where a switch does its damage; and the last one
HELD_OUT = 100  # test inputs of each task on which drift is measured, and accuracy on the way
SCORED = 8  # test images of each task whose scores are drawn


@dataclass
class Record:
    """What was found, task by task; accuracies in percent.

    Attributes:
        within_task: After task i, the accuracies on tasks 0 to i among each task's own classes (task-aware).
        all_classes: The same among all classes of the head (task-free).
        way: For each network tested on the way: the task being learnt, the step, and the accuracies, task-aware, on
            the first ``HELD_OUT`` test inputs of the earlier tasks.
        drift_held_out: After each task, the mean squared change of the outputs on test inputs of the tasks before it,
            since each was learnt.
        scores: After each task, the probability of the right class for ``SCORED`` test images of every task.
        weights: After each task, the parameters, flat.
        seconds: For each task after the first, tests not counted.
        remembered: Bytes kept of the earlier tasks, at the end.
        peak: The process's (or the device's) peak memory in bytes, tests included; None where it cannot be told.
    """

    within_task: list[list[float]] = field(default_factory=list)
    all_classes: list[list[float]] = field(default_factory=list)
    way: list[tuple[int, int, list[float]]] = field(default_factory=list)
    drift_held_out: list[float] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    remembered: int = 0
    peak: int | None = None

    def metrics(self) -> dict[str, float | None]:
        """The numbers of ``results.json``."""
        last = self.within_task[-1]
        moved = [now - row[-1] for now, row in zip(last[:-1], self.within_task, strict=False)]
        return {
            "within_task": _mean(last),
            "all_classes": _mean(self.all_classes[-1]),
            "backward_transfer": _mean(moved),
            "worst_on_path": min(min(found) for _, _, found in self.way),
            "drift_held_out": self.drift_held_out[-1],
            "seconds": sum(self.seconds),
            "peak_megabytes": None if self.peak is None else self.peak / 1e6,
            "remembered_megabytes": self.remembered / 1e6,
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def within(classes: int) -> Loss:
    """Cross-entropy of each input among the classes of its own task, where every task has ``classes`` of them."""

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        task, own = labels // classes, labels % classes
        return F.cross_entropy(z.unflatten(1, (-1, classes))[torch.arange(len(z)), task], own)

    return loss


def learn_sequence(
    method: str,
    model: nn.Module,
    tasks: Sequence[Task],
    settings: learners.Settings,
    *,
    epochs: int,
    batch_size: int,
    loss: Loss,
    shift: Augment | None,
    augment: Augment | None,
    seed: int,
    checkpoint: Path,
    resume: bool,
    progress: Progress = lambda steps, text: None,
) -> Record:
    """Learns the tasks after the first, in turn.

    Args:
        method: Of ``recipes.learners.METHODS``.
        model: The network that has learnt the first task; trained in place.
        tasks: All of them.
        settings: How they are learnt.
        epochs: Passes over each task.
        batch_size: Inputs of a step.
        loss: Of outputs and labels.
        shift: Augmentation of the batches.
        augment: Augmentation of the remembered inputs, where no label is needed.
        seed: Of the batches and of what is remembered.
        checkpoint: Written after every task; an interrupted run loses the task in hand alone.
        resume: Whether to go on from ``checkpoint``, if it is there.
        progress: Called with the number of steps just taken and what is going on.

    Returns:
        What was found.
    """
    learner = learners.learner(
        method, model, settings, augment=augment, seed=seed, freeze_batch_norm=True, loss=loss
    )
    run = _Sequence(model, learner, tasks, settings.anchors, seed)
    if resume and checkpoint.exists():
        run.load(checkpoint)
    else:
        run.finish_task(0)
    device = tasks[0].train_inputs.device
    for k in range(len(run.record.within_task), len(tasks)):
        task = tasks[k]
        steps = epochs * steps_an_epoch(task, batch_size)
        batches = minibatches(task, batch_size=batch_size, epochs=epochs, seed=seed + 1000 * k)
        torch.manual_seed(seed + 1000 * k)  # of the shifts; the same whether resumed or not
        with PeakMemory(device) as memory:
            seconds = learner.learn(
                ((shift(x), y) for x, y in batches) if shift else batches,
                steps=steps,
                after_step=run.on_the_way(k, steps, progress),
            )
        run.record.seconds.append(seconds)
        if memory.peak is not None:
            run.record.peak = max(memory.peak, run.record.peak or 0)
        run.finish_task(k)
        run.save(checkpoint)
    return run.record


class _Sequence:
    """A learner on its way through the tasks."""

    def __init__(
        self, model: nn.Module, learner: Learner, tasks: Sequence[Task], anchors: int, seed: int
    ) -> None:
        self.model, self.learner, self.tasks = model, learner, tasks
        self.anchors, self.seed = anchors, seed
        self.record = Record()
        self.held_out: AnchorBatch | None = None

    def on_the_way(self, k: int, steps: int, progress: Progress) -> Callable[[int], None]:
        """Tests the earlier tasks on some of the networks on the way."""

        def after_step(step: int) -> None:
            if step in TESTED_STEPS or step == steps:
                found = [
                    accuracy(
                        self.model,
                        task.test_inputs[:HELD_OUT],
                        task.test_labels[:HELD_OUT],
                        classes=task.class_range,
                    )
                    for task in self.tasks[:k]
                ]
                self.record.way.append((k, step, found))
            progress(1, f"task {k + 1} of {len(self.tasks)}")

        return after_step

    def finish_task(self, k: int) -> None:
        """Tests all tasks so far, and remembers some inputs of the last one."""
        record, task = self.record, self.tasks[k]
        seen = [(t, t.test_inputs, t.test_labels) for t in self.tasks[: k + 1]]
        record.within_task.append(
            [accuracy(self.model, x, y, classes=t.class_range) for t, x, y in seen]
        )
        record.all_classes.append([accuracy(self.model, x, y) for _, x, y in seen])
        some = [(t.test_inputs[:SCORED], t.test_labels[:SCORED]) for t in self.tasks]
        record.scores.append(torch.cat([scores(self.model, x, y).cpu() for x, y in some]))
        flat = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        record.weights.append(flat.cpu())
        if self.held_out is None:
            self.held_out = AnchorBatch(self.model, task.test_inputs[:HELD_OUT])
        else:
            record.drift_held_out.append(self.held_out.drift())
            self.held_out.extend(task.test_inputs[:HELD_OUT])
        chosen = torch.randperm(
            len(task.train_inputs), generator=torch.Generator().manual_seed(self.seed + k)
        )[: self.anchors].to(task.train_inputs.device)
        self.learner.remember(task.train_inputs[chosen], task.train_labels[chosen])
        record.remembered = self.learner.remembered_bytes()

    def save(self, path: Path) -> None:
        """Everything that going on takes, whole or not at all."""
        assert self.held_out is not None
        state = {
            "model": self.model.state_dict(),
            "learner": self.learner.state(),
            "held_out": self.held_out.state_dict(),
            "record": vars(self.record),
        }
        replace(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: Path) -> None:
        """Takes over what :meth:`save` wrote."""
        # Written by this recipe in the user's own folder; what Avalanche keeps are objects, not tensors alone.
        state: Mapping[str, Any] = torch.load(path, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.record = Record(**state["record"])
        first = self.tasks[0].test_inputs[:HELD_OUT]
        self.held_out = AnchorBatch(self.model, first)
        self.held_out.load_state_dict(state["held_out"])
        self.learner.load(state["learner"])
