"""Make a trained network right on a few wrong inputs, and flip nothing else: ``python -m recipes.hotfix --help``.

A trained network gets a few inputs wrong. Steps on the loss of these inputs make it right, while its outputs on anchors
are held. A budget says how many of the check inputs may change their prediction, and the network that is left is within
it. Other methods do the same beside it; their settings are chosen on the check inputs. All networks are measured on
unseen inputs, by which nothing was chosen.

The recipe writes to ``--out``: ``results.json``, and for each seed the old network and the network of each method as
safetensors files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from recipes.common import report, stored
from recipes.common.checkpoints import load_weights
from recipes.common.data import DataError, load_task
from recipes.common.options import (
    add_data_options,
    add_method_option,
    add_run_options,
    run_recipe,
    usable_device,
)
from recipes.common.recipe_settings import add_settings_options, given_settings, option_kinds
from recipes.hotfix import tables
from recipes.hotfix.case import check_sizes, with_held_out
from recipes.hotfix.experiment import HotfixExperiment
from recipes.hotfix.methods import METHODS
from recipes.hotfix.settings import HotfixSettings
from recipes.hotfix.setups import SETUPS, Setup

RECIPE = "hotfix"
PROGRAM = f"python -m recipes.{RECIPE}"
DEFAULT_METHODS = ("fip", "plain", "distillation", "l2sp", "interpolation")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    return run_recipe(lambda: _main(argv), PROGRAM, "keeps the methods that were finished")


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    setup = SETUPS[arguments.data]
    settings = _defaults(setup).changed(
        **given_settings(arguments, setup.settings, option_kinds(METHODS.values()))
    )
    methods = list(METHODS) if "all" in arguments.method else list(dict.fromkeys(arguments.method))
    device = usable_device(parser, arguments.device)
    checkpoint = _checkpoint(parser, arguments, setup)
    try:
        task = load_task(arguments.data, data_root=arguments.data_root, download=arguments.download)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    task = with_held_out(task, setup.held_out)
    try:
        check_sizes(task, settings, development=arguments.development)
    except DataError as error:
        parser.error(str(error))
    config = {
        "data": arguments.data,
        **stored.identity(arguments.checkpoint),
        "epochs": setup.epochs,
        "development": arguments.development,
        **settings.flat(),
    }
    experiment = HotfixExperiment(
        setup,
        task.to(device),
        settings,
        checkpoint=checkpoint,
        development=arguments.development,
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
    print(f"\n{tables.table(records, settings)}")
    report.write_results(
        arguments.out / "results.json",
        recipe=RECIPE,
        config={**config, "seeds": seeds},
        environment=report.environment(device),
        metrics=tables.metrics(records),
    )
    if "fip" in records:
        for seed, record in zip(seeds, records["fip"], strict=True):
            print(f"\nseed {seed}, {record['title']}\n{record['text']}")
    print(f"\nresults.json and the networks are in {arguments.out}")
    return 0


def _checkpoint(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, setup: Setup
) -> nn.Module | None:
    if arguments.checkpoint is None:
        if setup.epochs is None:
            parser.error(
                f"argument --checkpoint: {arguments.data} needs the file of a trained network"
            )
        return None
    if setup.epochs is not None:
        parser.error(
            f"argument --checkpoint: the network of {arguments.data} is trained here, because the inputs that it was "
            "not trained on must be known"
        )
    if not arguments.checkpoint.is_file():
        parser.error(f"argument --checkpoint: cannot be read: {arguments.checkpoint} is no file")
    model = setup.build()
    try:
        load_weights(arguments.checkpoint, model)
    except DataError as error:
        parser.error(f"argument --checkpoint: {error}")
    return model


def _defaults(setup: Setup) -> HotfixSettings:
    """The default settings, with the options of every method that is registered."""
    return setup.settings.completed(option_kinds(METHODS.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Make a trained network right on inputs that it gets wrong, and flip nothing else.",
        epilog=f"Defaults in brackets are those for {' / '.join(SETUPS)}.",
    )
    data = parser.add_argument_group("network and data")
    data.add_argument("--data", choices=list(SETUPS), default="digits", help="[%(default)s]")
    add_data_options(data, validation=False)
    data.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="the trained network, as safetensors or a torch state dict [for digits trained here]",
    )
    data.add_argument(
        "--development",
        action="store_true",
        help="leave the inputs that are kept for results alone and measure on others: for choosing settings",
    )
    run = parser.add_argument_group("run")
    add_method_option(run, METHODS, list(DEFAULT_METHODS))
    add_run_options(run, RECIPE)
    defaults = [_defaults(setup) for setup in SETUPS.values()]
    add_settings_options(parser, defaults, option_kinds(METHODS.values()))
    return parser
