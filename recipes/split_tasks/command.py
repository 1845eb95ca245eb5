"""Learn tasks in turn, with a few remembered inputs of those before: ``python -m recipes.split_tasks --help``.

The classes of a data set are split into tasks of a few classes each, on one head. A network learns the first; then
copies of it learn the others in turn, along functionally invariant paths and by other methods to compare them with,
all on the same batches and with the same remembered inputs, which grow by some after every task.

The folder ``--out`` gets ``results.json``, a checkpoint of each seed and method for ``--resume``, and four plots:
``tasks.png`` (each task's accuracy as others follow), ``bars.png``, ``scores.png`` and ``weights.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from recipes.common.data import DataError, Task, load_task, split
from recipes.common.options import (
    COUNT,
    add_data_options,
    add_method_option,
    add_run_options,
    run_recipe,
    usable_device,
    whole,
)
from recipes.continual.methods import METHODS, options_of
from recipes.continual.options import (
    add_settings_options,
    chosen_methods,
    config_of,
    settings_from,
)
from recipes.split_tasks.experiment import SplitTasksExperiment
from recipes.split_tasks.results import RECIPE, report_all
from recipes.split_tasks.settings import CLASSES, DEFAULTS, SplitTasksSettings

PROGRAM = f"python -m recipes.{RECIPE}"
DEFAULT_METHODS = ("fip", "distillation", "naive")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    return run_recipe(lambda: _main(argv), PROGRAM, "loses the task in hand alone")


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = usable_device(parser, arguments.device)
    settings = settings_from(parser, arguments, defaults_of(parser, arguments))
    if settings.hold != "all" and settings.output_space != "logits":
        parser.error(
            f"argument --hold: {settings.hold} goes with --output-space logits, got "
            f"{settings.output_space!r}; give --hold all"
        )
    if settings.hold != "all" and options_of("fip", settings).max_flips is not None:
        parser.error(
            f"argument --max-flips: an old class may be taken for a new one, so predictions count over all of the "
            f"head, but --hold {settings.hold} leaves outputs out; give --hold all"
        )
    methods = chosen_methods(parser, arguments)
    classes = arguments.classes or CLASSES[arguments.data]
    tasks = load_tasks(parser, arguments, classes, device)
    if len(tasks) < 2:
        parser.error("argument --classes: that leaves one task; two or more are a sequence")
    if arguments.tasks is not None and arguments.tasks > len(tasks):
        parser.error(f"argument --tasks: {arguments.tasks} is more than the {len(tasks)} there are")
    tasks = tasks[: arguments.tasks]
    fewest = min(len(t.train_inputs) for t in tasks)
    if settings.anchors > fewest:
        parser.error(
            f"argument --anchors: {settings.anchors} is more than the {fewest} training inputs of a task"
        )
    config = whole_config(arguments, tasks, settings)
    seeds: list[int] = arguments.seeds or [arguments.seed]
    experiment = SplitTasksExperiment(
        arguments.data, tasks, settings, config, arguments.out, progress=arguments.progress
    )
    experiment.prepare(parser, seeds, resume=arguments.resume)
    records = experiment.run(seeds, methods)
    report_all(arguments.out, records, {**config, "seeds": seeds}, device)
    return 0


def defaults_of(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> SplitTasksSettings:
    """The default settings of ``--data`` and ``--budget``; if there are none, the parser ends the program."""
    key = (arguments.data, arguments.budget)
    if key not in DEFAULTS:
        parser.error(f"argument --budget: {arguments.data} has no budget but short")
    return DEFAULTS[key]


def load_tasks(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    classes: int,
    device: torch.device,
) -> list[Task]:
    """The tasks of ``classes`` classes each; if they cannot be read, the parser ends the program and says why."""
    try:
        task = load_task(arguments.data, data_root=arguments.data_root, download=arguments.download)
        if arguments.validation > 0:
            task = task.held_out(arguments.validation)
        return [t.to(device) for t in split(task, classes)]
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def whole_config(
    arguments: argparse.Namespace, tasks: Sequence[Task], settings: SplitTasksSettings
) -> dict[str, Any]:
    """Everything that results depend on except the seed."""
    return {
        "data": arguments.data,
        "budget": arguments.budget,
        "classes": tasks[0].classes,
        "tasks": len(tasks),
        "validation": arguments.validation,
        **config_of(settings),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Learn tasks in turn, with a few remembered inputs of those before.",
        epilog="Defaults in brackets are those for "
        + ", ".join(f"{data} ({budget})" for data, budget in DEFAULTS)
        + ".",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=list(CLASSES), default="digits", help="[%(default)s]")
    data.add_argument(
        "--classes",
        help=f"classes of a task [{' / '.join(map(str, CLASSES.values()))}]",
        **COUNT,
    )
    data.add_argument(
        "--tasks",
        help="only the first N tasks, on a head of their classes [all]",
        type=whole(2),
        metavar="N",
    )
    add_data_options(data)
    run = parser.add_argument_group("run")
    add_run_options(run, RECIPE)
    add_method_option(run, METHODS, DEFAULT_METHODS)
    run.add_argument(
        "--budget",
        choices=["short", "full"],
        default="short",
        help="short is for two cores, full for a GPU: the same tasks, more epochs [%(default)s]",
    )
    add_settings_options(parser, list(DEFAULTS.values()))
    return parser
