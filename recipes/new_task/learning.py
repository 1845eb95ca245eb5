"""How the two tasks are learnt: the first from scratch, the second by one method, tested on the way."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fipoptim import AnchorBatch, certify
from recipes.common.augment import many
from recipes.common.data import Task
from recipes.common.process_memory import PeakMemory
from recipes.common.training import (
    accuracy,
    adam_one_cycle,
    minibatches,
    outputs,
    scores,
    steps_an_epoch,
    steps_in_epochs,
    train,
)
from recipes.continual.methods import METHODS, make_learner
from recipes.new_task.outcome import Curve, Outcome
from recipes.new_task.settings import NewTaskSettings

EARLY_STEPS = (0, 1, 2, 3, 5, 10, 20, 50, 100)  # a switch of task does its damage here
TESTED_EVENLY = 20  # networks on the way that are tested beside these
HELD_OUT = 2000  # test inputs of task 1 on which changes are measured, too
SCORED = 60  # test images of each task whose scores are drawn
IN_WEIGHT_SPACE = ("fip", "naive")  # the methods whose networks are drawn in weight space
DRAWN_THERE = 10  # networks of each


def spacing(steps: int) -> int:
    """The number of steps from one recorded network to the next; recorded networks are tested."""
    return max(1, round(steps / TESTED_EVENLY))


def tested_steps(steps: int) -> list[int]:
    """The steps whose networks are tested: the recorded ones, and more of the first steps."""
    early = {step for step in EARLY_STEPS if step <= steps}
    return sorted(early | {*range(0, steps, spacing(steps)), steps})


def drawn_steps(steps: int) -> set[int]:
    """The steps whose networks are drawn in weight space, some of the tested ones."""
    tested = tested_steps(steps)
    return {*tested[:: math.ceil(len(tested) / DRAWN_THERE)], steps}


def learn_first_task(
    model: nn.Module, task: Task, settings: NewTaskSettings, *, seed: int, progress: bool
) -> None:
    """Trains a network on the first task by Adam on one cycle; in place."""
    steps = settings.task1_epochs * steps_an_epoch(task, settings.batch_size)
    optimizer, scheduler = adam_one_cycle(model, lr=settings.task1_lr, steps=steps)
    with tqdm(total=steps, desc=task.name, unit="step", disable=not progress) as bar:
        train(
            model,
            minibatches(
                task, batch_size=settings.batch_size, epochs=settings.task1_epochs, seed=seed
            ),
            optimizer,
            scheduler,
            after_step=lambda step: bar.update(step - bar.n),
        )


def learn_second_task(
    method: str,
    model: nn.Module,
    task1: Task,
    task2: Task,
    remembered: tuple[Tensor, Tensor],
    settings: NewTaskSettings,
    *,
    seed: int,
    progress: bool,
    networks: Path | None,
) -> Outcome:
    """Teaches the second task to a network and tests networks on the way.

    Args:
        method: The name of the method.
        model: The network that has learnt the first task; trained in place.
        task1: The first task.
        task2: The second task.
        remembered: Inputs of the first task and their labels, for the method to remember.
        settings: How the second task is learnt.
        seed: The seed of the batches and of what the method draws.
        progress: Whether to show a progress bar.
        networks: The folder that keeps the networks along the path; None if none are kept.
    """
    inputs, labels = remembered
    # These only measure, in the same way for all methods.
    anchors = AnchorBatch(model, inputs, output=settings.output_space)
    start, held_out = copy.deepcopy(model), task1.test_inputs[:HELD_OUT]
    predicted = outputs(start, held_out).argmax(dim=1)
    epochs = settings.epochs_of(method)
    steps = steps_in_epochs(task2, settings.batch_size, epochs)
    # Batch norm is frozen: the function to keep is that of eval mode, and if running statistics followed task 2's
    # inputs, outputs on the anchors would change although no weight moved.
    learner = make_learner(
        method,
        model,
        settings,
        augment=many(task1.name, settings.views) if settings.augment else None,
        seed=seed,
        freeze_batch_norm=True,
    )
    learner.remember(inputs, labels)
    title = METHODS[method].title
    curve, weights, tested_scores = Curve(), list[Tensor](), list[Tensor]()
    tested, drawn = set(tested_steps(steps)), drawn_steps(steps)
    with tqdm(total=steps, desc=f"{task2.name}, {title}", unit="step", disable=not progress) as bar:

        def test(step: int) -> None:
            if step in tested:
                first = accuracy(model, task1.test_inputs, task1.test_labels)
                second = accuracy(model, task2.test_inputs, task2.test_labels)
                drift = float(anchors.drift())
                changed = outputs(model, held_out).argmax(dim=1) != predicted
                counted = learner.counted()
                curve.add(
                    step,
                    first,
                    second,
                    drift=drift,
                    flips=float(changed.double().mean()),
                    counted=None if counted is None else counted.flips,
                )
                tested_scores.append(
                    torch.cat(
                        [
                            scores(model, t.test_inputs[:SCORED], t.test_labels[:SCORED])
                            for t in (task1, task2)
                        ]
                    ).cpu()
                )
                if method in IN_WEIGHT_SPACE and step in drawn:
                    flat = [p.detach().flatten() for p in model.parameters()]
                    weights.append(torch.cat(flat).cpu())
                bar.set_postfix_str(
                    f"{task1.name} {first:.1f}, {task2.name} {second:.1f}, drift {drift:.2g}",
                    refresh=False,
                )
            bar.update(step - bar.n)

        test(0)
        with PeakMemory(inputs.device) as measured:
            seconds = learner.learn(
                minibatches(task2, batch_size=settings.batch_size, epochs=epochs, seed=seed + 1),
                steps=steps,
                after_step=test,
                record=None if networks is None else (spacing(steps), networks),
            )
    certificate = certify(
        model,
        start,
        held_out,
        task1.test_labels[:HELD_OUT],
        output=settings.output_space,
        chunk_size=HELD_OUT,
    )
    return Outcome(
        curve=curve,
        predictions_kept=anchors.predictions_kept(),
        drift_held_out=certificate.drift.rate,
        flips_at_most=certificate.flips.bound,
        certificate=str(certificate),
        within_task={
            name: accuracy(model, t.test_inputs, t.test_labels, classes=t.class_range)
            for name, t in (("task1", task1), ("task2", task2))
        },
        remembered_megabytes=learner.remembered_bytes() / 1e6,
        seconds=seconds,
        peak_megabytes=None if measured.peak is None else measured.peak / 1e6,
        scores=torch.stack(tested_scores),
        weights=torch.stack(weights) if weights else None,
    )
