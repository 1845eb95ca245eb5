"""Put the weights of a network on a grid of few bits, and keep its function: ``python -m recipes.quantize --help``.

A functionally invariant path leads from a dense network to one whose weights are integers of k bits times a scale for
each output channel. It reads no label: the outputs of the dense network, and those of layers on the way, are held on a
few hundred training images. Other methods run beside it, from the same dense network and on the same images.

The recipe writes to ``--out``: ``results.json``, a safetensors file for each network, and a plot.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from recipes.common import report, stored
from recipes.common.checkpoints import load_weights
from recipes.common.data import DataError, Task, load_task
from recipes.common.options import (
    add_data_options,
    add_method_option,
    add_run_options,
    run_recipe,
    usable_device,
)
from recipes.common.recipe_settings import add_settings_options, given_settings, option_kinds
from recipes.quantize.experiment import QuantizeExperiment
from recipes.quantize.methods import METHODS
from recipes.quantize.methods.path import PathOptions
from recipes.quantize.networks import NETWORKS, Network
from recipes.quantize.results import RECIPE, report_results
from recipes.quantize.settings import QuantizeSettings

PROGRAM = f"python -m recipes.{RECIPE}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    return run_recipe(lambda: _main(argv), PROGRAM, "keeps the networks that were finished")


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    network = NETWORKS[arguments.network]
    data = arguments.data or network.data[0]
    if data not in network.data:
        parser.error(
            f"argument --data: {arguments.network} takes {' or '.join(network.data)}, got {data!r}; "
            f"choose another --network ({', '.join(NETWORKS)})"
        )
    settings = _defaults(network).changed(
        **given_settings(arguments, network.settings, option_kinds(METHODS.values()))
    )
    settings = settings.changed(bits=tuple(sorted(settings.bits, reverse=True)))
    _check_layers(parser, network, settings)
    methods = list(METHODS) if "all" in arguments.method else list(dict.fromkeys(arguments.method))
    device = usable_device(parser, arguments.device)
    checkpoint = _checkpoint(parser, arguments, network)
    task = _task(parser, arguments, data, settings)
    config = {
        "network": arguments.network,
        "data": data,
        **stored.identity(arguments.checkpoint),
        "dense_epochs": None if checkpoint is not None else network.epochs,
        "validation": arguments.validation,
        **settings.flat(),
    }
    experiment = QuantizeExperiment(
        network,
        task.to(device),
        settings,
        checkpoint=checkpoint,
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
    report_results(experiment, records, seeds, export=arguments.export)
    return 0


def _defaults(network: Network) -> QuantizeSettings:
    """The default settings of a network, with the options of every method that is registered."""
    return network.settings.completed(option_kinds(METHODS.values()))


def _check_layers(
    parser: argparse.ArgumentParser, network: Network, settings: QuantizeSettings
) -> None:
    known = [name for name, _ in network.build().named_modules() if name]
    for name in settings.of(PathOptions).hold:
        if name not in known:
            parser.error(
                f"argument --hold: the network has no layer {name!r}; choose from {', '.join(known)}"
            )


def _checkpoint(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, network: Network
) -> nn.Module | None:
    if arguments.checkpoint is None:
        if network.epochs is None:
            parser.error(
                f"argument --checkpoint: {arguments.network} needs the file of a trained network"
            )
        return None
    if not arguments.checkpoint.is_file():
        parser.error(f"argument --checkpoint: cannot be read: {arguments.checkpoint} is no file")
    model = network.build()
    try:
        load_weights(arguments.checkpoint, model)
    except DataError as error:
        parser.error(f"argument --checkpoint: {error}")
    return model


def _task(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    data: str,
    settings: QuantizeSettings,
) -> Task:
    try:
        task = load_task(data, data_root=arguments.data_root, download=arguments.download)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if arguments.validation > 0:
        task = task.held_out(arguments.validation)
    count = len(task.train_inputs)
    if settings.anchors is not None and settings.anchors > count:
        parser.error(
            f"argument --anchors: {settings.anchors} is more than the {count} training inputs of {data}"
        )
    return task


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Put the weights of a trained network on a grid of few bits, and keep its function.",
        epilog=f"Defaults in brackets are those for {' / '.join(NETWORKS)}.",
    )
    data = parser.add_argument_group("network and data")
    data.add_argument(
        "--network", choices=list(NETWORKS), default=next(iter(NETWORKS)), help="[%(default)s]"
    )
    data.add_argument(
        "--data", metavar="NAME", help="digits, mnist, fashion-mnist or cifar10 [the network's]"
    )
    add_data_options(data)
    data.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a trained dense network, as safetensors or a torch state dict [trained here, except resnet20]",
    )
    run = parser.add_argument_group("run")
    add_method_option(run, METHODS, list(METHODS))
    add_run_options(run, RECIPE)
    run.add_argument(
        "--export",
        action="store_true",
        help="also write packed integers and scales of the networks of the first seed",
    )
    defaults = [_defaults(network) for network in NETWORKS.values()]
    add_settings_options(parser, defaults, option_kinds(METHODS.values()))
    return parser
