"""A network for each task: what a sequence on one network could reach without forgetting anything.

``python -m recipes.split_tasks.separate --help``. Each network starts where all methods of the recipe start, at the one
that has learnt the first task, and is trained by Adam on its own task alone, for as many epochs as a task has there.
Nothing is remembered, and nothing has to be held.

The folder ``--out`` gets ``results.json``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

from recipes.common import report
from recipes.common.options import (
    COUNT,
    add_data_options,
    add_run_options,
    run_recipe,
    usable_device,
)
from recipes.common.progress import progress_bar
from recipes.common.training import accuracy, adam_one_cycle, minibatches, steps_an_epoch, train
from recipes.continual.methods import options_of
from recipes.split_tasks.command import defaults_of, load_tasks, whole_config
from recipes.split_tasks.experiment import SplitTasksExperiment
from recipes.split_tasks.settings import CLASSES

RECIPE = "split_tasks.separate"
PROGRAM = f"python -m recipes.{RECIPE}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs from the command line; returns the exit status."""
    return run_recipe(lambda: _main(argv), PROGRAM, "loses what it found")


def accuracies_of(experiment: SplitTasksExperiment, seed: int) -> list[float]:
    """The test accuracy of each task's own network among the classes of the task, in percent."""
    start, tasks, settings = experiment.start(seed), experiment.tasks, experiment.settings
    found = [_tested(start, experiment, 0)]
    epochs, shift = settings.baseline_epochs, experiment.shift
    options = options_of("naive", settings)
    total = sum(epochs * steps_an_epoch(task, settings.batch_size) for task in tasks[1:])
    with progress_bar(f"seed {seed}, separate", total, shown=experiment.progress) as show:
        for k, task in enumerate(tasks[1:], start=1):
            model = copy.deepcopy(start)
            steps = epochs * steps_an_epoch(task, settings.batch_size)
            batches = minibatches(
                task, batch_size=settings.batch_size, epochs=epochs, seed=seed + 1000 * k
            )
            torch.manual_seed(seed + 1000 * k)
            train(
                model,
                ((shift(x), y) for x, y in batches) if shift else batches,
                *adam_one_cycle(model, lr=options.lr, steps=steps, momentum=options.momentum),
                loss=experiment.loss,
                after_step=lambda step: show(1, ""),
            )
            found.append(_tested(model, experiment, k))
    return found


def _tested(model: nn.Module, experiment: SplitTasksExperiment, k: int) -> float:
    task = experiment.tasks[k]
    return accuracy(model, task.test_inputs, task.test_labels, classes=task.class_range)


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = usable_device(parser, arguments.device)
    settings = defaults_of(parser, arguments)
    if arguments.epochs is not None:
        settings = dataclasses.replace(settings, baseline_epochs=arguments.epochs)
    tasks = load_tasks(parser, arguments, CLASSES[arguments.data], device)
    seeds = arguments.seeds or [arguments.seed]
    config = whole_config(arguments, tasks, settings)
    experiment = SplitTasksExperiment(
        arguments.data, tasks, settings, config, arguments.out, progress=arguments.progress
    )
    experiment.prepare(parser, seeds, resume=arguments.resume)
    accuracies, seconds = [], []
    for seed in seeds:
        begun = time.perf_counter()
        accuracies.append(accuracies_of(experiment, seed))
        seconds.append(time.perf_counter() - begun)
    means = [statistics.fmean(of_one) for of_one in accuracies]
    print(
        f"a network for each of {len(tasks)} tasks: "
        f"{report.mean_and_deviation(means, '.2f')} % correct within tasks, "
        f"{report.mean_and_deviation(seconds, '.0f')} s"
    )
    report.write_results(
        arguments.out / "results.json",
        recipe=RECIPE,
        config={**config, "seeds": seeds},
        environment=report.environment(device),
        metrics={"within_task": means, "tasks": accuracies, "seconds": seconds},
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Train a network for each task alone: a ceiling for one network."
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=list(CLASSES), default="digits", help="[%(default)s]")
    data.add_argument("--budget", choices=["short", "full"], default="short", help="[%(default)s]")
    data.add_argument("--epochs", help="epochs of a task [those of the recipe's methods]", **COUNT)
    add_data_options(data)
    add_run_options(parser.add_argument_group("run"), RECIPE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
