"""One method on a sequence of tasks: it learns each, is tested on the way, and remembers some inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipoptim.anchors.output_space import squared_distance
from recipes.common.augment import Augment
from recipes.common.batch_statistics import by_batch, with_statistics
from recipes.common.data import Task
from recipes.common.process_memory import PeakMemory, give_back
from recipes.common.progress import Progress
from recipes.common.training import accuracy, minibatches, outputs, scores, steps_an_epoch
from recipes.continual.methods import make_learner
from recipes.continual.methods.base import Learner, Loss
from recipes.continual.remembered import draw_remembered
from recipes.split_tasks.settings import SplitTasksSettings

TESTED_STEPS = (1, 3, 10)  # a switch of task does its damage here; the last step is tested, too
HELD_OUT = 100  # test inputs of each task for the drift, and for the accuracy within a task's steps
SCORED = 8  # test images of each task whose scores are drawn
STATISTICS_INPUTS = 500  # remembered inputs, equally many a task, for batch norm's statistics
STATISTICS_BATCH = 100  # of these at a time


@dataclass
class Record:
    """What was found, task by task; accuracies in percent.

    Attributes:
        within_task: After task i, the accuracies on tasks 0 to i among the classes of each task (task-aware).
        all_classes: The same among all classes of the head (task-free).
        visited: For each network tested between two tasks: the task that is being learnt, the step, and the task-aware
            accuracies on the first ``HELD_OUT`` test inputs of the earlier tasks.
        drift_held_out: After each task, how far the outputs on test inputs of the earlier tasks have moved since each
            task was learnt: the mean squared change, of the outputs of the classes that were known then.
        scores: After each task, the probability ``(images,)`` of the right class for ``SCORED`` test images a task.
        weights: After each task, all parameters as one vector ``(n,)``.
        seconds: Seconds for each task after the first, without those of tests.
        remembered: Bytes kept of the earlier tasks at the end.
        peak: Peak memory of the process, or of the device, in bytes, tests included; None if the system does not tell.
    """

    within_task: list[list[float]] = field(default_factory=list)
    all_classes: list[list[float]] = field(default_factory=list)
    visited: list[tuple[int, int, list[float]]] = field(default_factory=list)
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
            "worst_on_path": min(min(found) for _, _, found in self.visited),
            "drift_held_out": self.drift_held_out[-1],
            "seconds": sum(self.seconds),
            "peak_megabytes": None if self.peak is None else self.peak / 1e6,
            "remembered_megabytes": self.remembered / 1e6,
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def within(classes: int) -> Loss:
    """A loss for tasks of ``classes`` classes each: cross-entropy among the classes of each input's own task."""

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        task, own = labels // classes, labels % classes
        return F.cross_entropy(z.unflatten(1, (-1, classes))[torch.arange(len(z)), task], own)

    return loss


def learn_sequence(
    method: str,
    model: nn.Module,
    tasks: Sequence[Task],
    settings: SplitTasksSettings,
    *,
    epochs: int,
    batch_size: int,
    loss: Loss,
    shift: Augment | None,
    augment: Augment | None,
    seed: int,
    partial: Mapping[str, Any] | None,
    save: Callable[[Mapping[str, Any]], None],
    progress: Progress = lambda steps, text: None,
) -> Record:
    """Learns the tasks after the first, in turn.

    Args:
        method: A key of ``recipes.continual.methods.METHODS``.
        model: The network that has learnt the first task; trained in place.
        tasks: All tasks, the first included.
        settings: How the tasks are learnt.
        epochs: Passes over each task.
        batch_size: Inputs of a step.
        loss: The loss of outputs and labels.
        shift: The augmentation of the batches; None leaves them as they are.
        augment: The augmentation of remembered inputs that need no label; None leaves them as they are.
        seed: The seed of the batches and of what is remembered.
        partial: What ``save`` got last from an interrupted run, to go on from there; None begins with the second task.
        save: Called after every task with everything that going on takes.
        progress: Called with the number of steps just taken and what is going on.

    Returns:
        What was found.
    """
    trained = by_batch(model) if settings.batch_norm == "batch" else model
    learner = make_learner(
        method,
        trained,
        settings,
        augment=augment,
        seed=seed,
        freeze_batch_norm=settings.batch_norm == "frozen",
        loss=loss,
    )
    run = SequenceRun(model, trained, learner, tasks, settings, seed)
    if partial is not None:
        run.load(partial)
    else:
        run.finish_task(0)
    device = tasks[0].train_inputs.device
    for k in range(len(run.record.within_task), len(tasks)):
        task = tasks[k]
        steps = epochs * steps_an_epoch(task, batch_size)
        batches = minibatches(task, batch_size=batch_size, epochs=epochs, seed=seed + 1000 * k)
        torch.manual_seed(seed + 1000 * k)  # the shifts are the same in a resumed run
        with PeakMemory(device) as measured:
            seconds = learner.learn(
                ((shift(x), y) for x, y in batches) if shift else batches,
                steps=steps,
                after_step=run.test_earlier_tasks(k, steps, progress),
            )
        run.record.seconds.append(seconds)
        if measured.peak is not None:
            run.record.peak = max(measured.peak, run.record.peak or 0)
        run.finish_task(k)
        save(run.state())
    return run.record


class SequenceRun:
    """A learner on its way through the tasks.

    Args:
        model: The network that is tested and saved, with running statistics if it has batch norm.
        trained: The network that the learner trains: ``model`` itself, or its copy from ``by_batch``.
        learner: The learner.
        tasks: All tasks, the first included.
        settings: How the tasks are learnt.
        seed: The seed of what is remembered.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: nn.Module,
        learner: Learner,
        tasks: Sequence[Task],
        settings: SplitTasksSettings,
        seed: int,
    ) -> None:
        self.model, self.trained, self.learner = model, trained, learner
        self.tasks, self.settings, self.seed = tasks, settings, seed
        self.record = Record()
        self.finished = model  # the network that was tested after the last task
        self.references: list[Tensor] = []  # outputs on test inputs of each task when it was learnt

    def network_to_test(self, k: int) -> nn.Module:
        """The network of this moment, while task ``k`` is learnt or right after, as it would be shipped."""
        if self.trained is self.model:
            return self.model
        share = max(1, STATISTICS_INPUTS // (k + 1))
        inputs = torch.cat([self.remembered(j)[0][:share] for j in range(k + 1)])
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(self.seed))
        batches = inputs[order.to(inputs.device)].split(STATISTICS_BATCH)
        return with_statistics(self.trained, self.model, batches)

    def test_earlier_tasks(self, k: int, steps: int, progress: Progress) -> Callable[[int], None]:
        """A function to call after each of the ``steps`` steps on task ``k``; it tests some of the networks."""

        def after_step(step: int) -> None:
            if step in TESTED_STEPS or step == steps:
                model = self.network_to_test(k)
                found = [
                    accuracy(
                        model,
                        task.test_inputs[:HELD_OUT],
                        task.test_labels[:HELD_OUT],
                        classes=task.class_range,
                    )
                    for task in self.tasks[:k]
                ]
                self.record.visited.append((k, step, found))
            give_back(step)
            progress(1, f"task {k + 1} of {len(self.tasks)}")

        return after_step

    def finish_task(self, k: int) -> None:
        """Tests all tasks so far, and remembers some inputs of the last one."""
        record, task, model = self.record, self.tasks[k], self.network_to_test(k)
        self.finished = model
        seen = [(t, t.test_inputs, t.test_labels) for t in self.tasks[: k + 1]]
        record.within_task.append(
            [accuracy(model, x, y, classes=t.class_range) for t, x, y in seen]
        )
        record.all_classes.append([accuracy(model, x, y) for _, x, y in seen])
        some = [(t.test_inputs[:SCORED], t.test_labels[:SCORED]) for t in self.tasks]
        record.scores.append(torch.cat([scores(model, x, y).cpu() for x, y in some]))
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        record.weights.append(flat.cpu())
        known = [
            outputs(model, t.test_inputs[:HELD_OUT])[:, : t.class_range[1]].cpu()
            for t in self.tasks[: k + 1]
        ]
        if self.references:
            moved = [squared_distance(*pair) for pair in zip(known, self.references, strict=False)]
            record.drift_held_out.append(float(torch.cat(moved).mean()))
        self.references.append(known[-1])
        head = self.tasks[-1].class_range[1]
        self.learner.remember(*self.remembered(k), self.settings.held_outputs(task, head))
        record.remembered = self.learner.remembered_bytes()

    def remembered(self, k: int) -> tuple[Tensor, Tensor]:
        """The inputs of task ``k`` that are remembered, and their labels."""
        return draw_remembered(self.tasks[k], self.settings.anchors, self.seed + k)

    def state(self) -> dict[str, Any]:
        """Everything that going on takes, as tensors and plain values."""
        return {
            "model": self.finished.state_dict(),
            "learner": self.learner.state(),
            "references": self.references,
            "record": vars(self.record),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state` returned."""
        self.trained.load_state_dict(
            {name: state["model"][name] for name in self.trained.state_dict()}
        )
        self.record, self.references = Record(**state["record"]), state["references"]
        self.learner.load(state["learner"])
