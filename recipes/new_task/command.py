"""Teach a trained network a second task while it keeps the first: ``python -m recipes.new_task --help``.

A network learns task 1. Then copies of it learn task 2, one by each method: along a functionally invariant path, and by
other methods to compare it with. All get the same batches and the same few remembered training inputs of task 1, and
all are tested on both tasks while they learn.

The folder ``--out`` gets ``results.json`` (configuration, environment, metrics), ``path.csv`` (all tested networks) and
four plots: ``path.png`` (both accuracies and the drift along the way), ``bars.png`` (the methods side by side),
``scores.png`` (how sure networks are of single test images) and ``weights.png`` (the networks in weight space). It also
gets the outcome of each method, from which ``--resume`` goes on after an interruption.

With ``--max-flips`` or ``--max-drift`` the path keeps a budget, counted on a part of the remembered inputs that no step
sees. ``budget.png`` shows a run with ``--max-flips``: what was learnt, and which share of the old predictions changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from recipes.common.data import DATASETS, DataError, Task, check_pair, load_pair
from recipes.common.options import (
    add_data_options,
    add_method_option,
    add_run_options,
    run_recipe,
    usable_device,
)
from recipes.continual.methods import METHODS
from recipes.continual.options import (
    add_settings_options,
    chosen_methods,
    config_of,
    settings_from,
)
from recipes.new_task.experiment import NewTaskExperiment
from recipes.new_task.results import RECIPE, report_seeds
from recipes.new_task.settings import DEFAULTS, NewTaskSettings

PROGRAM = f"python -m recipes.{RECIPE}"
DEFAULT_METHODS = ("fip", "distillation", "naive")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    return run_recipe(lambda: _main(argv), PROGRAM, "loses the method in hand alone")


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    settings = _settings(parser, arguments)
    device = usable_device(parser, arguments.device)
    task1, task2 = _tasks(parser, arguments)
    if settings.anchors > len(task1.train_inputs):
        parser.error(
            f"argument --anchors: {settings.anchors} is more than the {len(task1.train_inputs)} "
            f"training inputs of {task1.name}"
        )
    methods = chosen_methods(parser, arguments)
    seeds: list[int] = arguments.seeds or [arguments.seed]
    config = {
        "task1": task1.name,
        "task2": task2.name,
        "validation": arguments.validation,
        **config_of(settings),
    }
    experiment = NewTaskExperiment(
        task1,
        task2,
        settings,
        config,
        arguments.out,
        device=device,
        seed_folders=bool(arguments.seeds),
        keep_networks=arguments.keep_networks,
        progress=arguments.progress,
    )
    experiment.prepare(parser, seeds, resume=arguments.resume)
    outcomes = experiment.run(seeds, methods)
    if len(seeds) > 1:
        report_seeds(
            arguments.out,
            outcomes,
            tasks=(task1.name, task2.name),
            config={**config, "methods": methods, "seeds": seeds},
            device=device,
        )
    return 0


def _tasks(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[Task, Task]:
    try:
        task1, task2 = load_pair(
            arguments.task1,
            arguments.task2,
            data_root=arguments.data_root,
            download=arguments.download,
        )
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if arguments.validation > 0:
        return task1.held_out(arguments.validation), task2.held_out(arguments.validation)
    return task1, task2


def _settings(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> NewTaskSettings:
    """The defaults of the pair, and over them what the command line says."""
    try:
        family = check_pair(arguments.task1, arguments.task2)
    except DataError as error:
        parser.error(str(error))
    return settings_from(parser, arguments, DEFAULTS[family])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Teach a trained network a second task while it keeps the first.",
        epilog="Defaults in brackets are those for digits / for mnist and fashion-mnist.",
    )
    data = parser.add_argument_group("data")
    names = [name for name, info in DATASETS.items() if info.family in DEFAULTS]
    data.add_argument("--task1", choices=names, default="digits-low", help="[%(default)s]")
    data.add_argument("--task2", choices=names, default="digits-high", help="[%(default)s]")
    add_data_options(data)

    run = parser.add_argument_group("run")
    add_run_options(run, RECIPE)
    add_method_option(run, METHODS, DEFAULT_METHODS)
    run.add_argument(
        "--keep-networks",
        action="store_true",
        help="also keep the networks along the path, for FIPPath.open, in the folder networks of --out",
    )
    add_settings_options(parser, list(DEFAULTS.values()))
    return parser
