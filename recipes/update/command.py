"""Teach a network in production more classes, and flip little that it gets right: ``python -m recipes.update --help``.

A network knows the first half of a data set's classes. Then there are labelled inputs of all classes, and it is to know
them all. Some of what it got right is wrong afterwards: these are the negative flips. The path is told how many it may
make (``--max-flips``), as a share of inputs that the old network gets right and that no step has seen. Other methods
start with the same network and have about the same time.

The recipe writes to ``--out``: ``results.json``, ``trade_off.png``, and for each seed the old network and the networks
of each method as safetensors files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from recipes.common import report
from recipes.common.data import DataError, load_task
from recipes.common.options import (
    add_data_options,
    add_method_option,
    add_run_options,
    run_recipe,
    usable_device,
)
from recipes.common.recipe_settings import add_settings_options, given_settings, option_kinds
from recipes.update import figures, tables
from recipes.update.experiment import UpdateExperiment
from recipes.update.methods import METHODS
from recipes.update.settings import UpdateSettings
from recipes.update.setups import SETUPS, Setup

RECIPE = "update"
PROGRAM = f"python -m recipes.{RECIPE}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    return run_recipe(
        lambda: _main(argv), PROGRAM, "keeps the old network and the methods that were finished"
    )


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    setup = SETUPS[arguments.network]
    settings = _settings(parser, arguments, setup)
    methods = list(METHODS) if "all" in arguments.method else list(dict.fromkeys(arguments.method))
    device = usable_device(parser, arguments.device)
    try:
        task = load_task(setup.data, data_root=arguments.data_root, download=arguments.download)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if arguments.validation > 0:
        task = task.held_out(arguments.validation)
    config = {
        "network": arguments.network,
        "validation": arguments.validation,
        **settings.flat(),
    }
    experiment = UpdateExperiment(
        setup,
        task.to(device),
        settings,
        config=config,
        out=arguments.out,
        environment=report.environment(device),
        progress=arguments.progress,
    )
    seeds = arguments.seeds or [arguments.seed]
    experiment.prepare(parser, seeds, resume=arguments.resume)
    try:
        records = experiment.run(seeds, methods)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"\n{tables.table(records)}")
    report.write_results(
        arguments.out / "results.json",
        recipe=RECIPE,
        config={**config, "seeds": seeds},
        environment=report.environment(device),
        metrics=tables.metrics(records),
    )
    figures.trade_off(arguments.out / "trade_off.png", records)
    for seed, record in zip(seeds, records.get("fip", []), strict=False):
        for network in record["networks"]:
            print(f"\nseed {seed}, {tables.titled(record['title'], network)}\n{network['text']}")
    print(f"\nresults.json, trade_off.png and the networks are in {arguments.out}")
    return 0


def _settings(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, setup: Setup
) -> UpdateSettings:
    given = given_settings(arguments, setup.settings, option_kinds(METHODS.values()))
    if "max_flips" in given:
        given["max_flips"] = tuple(given["max_flips"])
    settings = _defaults(setup).changed(**given)
    if settings.held_out == 0:
        parser.error("argument --held-out: 0 leaves no input for a budget to count on")
    return settings


def _defaults(setup: Setup) -> UpdateSettings:
    """The default settings, with the options of every method that is registered."""
    return setup.settings.completed(option_kinds(METHODS.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Teach a network more classes, and flip little that it gets right.",
        epilog=f"Defaults in brackets are those for {' / '.join(SETUPS)}.",
    )
    data = parser.add_argument_group("network and data")
    data.add_argument("--network", choices=list(SETUPS), default="digits", help="[%(default)s]")
    add_data_options(data)
    run = parser.add_argument_group("run")
    add_method_option(run, METHODS, list(METHODS))
    add_run_options(run, RECIPE)
    defaults = [_defaults(setup) for setup in SETUPS.values()]
    add_settings_options(parser, defaults, option_kinds(METHODS.values()))
    return parser
