"""Take weights out of a trained network while it keeps its function: ``python -m recipes.sparsify --help``.

A functionally invariant path leads from a dense network to networks of which a given share of the weights is exactly
zero. It goes by stages, with waypoints if the sparsities are far apart. The secondary objective is the distance to the
nearest sparse network, nearest in the anchors' metric; the outputs of the dense network on training inputs are held,
and no label is read. ``FIPOptimizer`` takes all steps. Other pruning methods run beside the path, from the same dense
network.

The recipe writes to ``--out``: ``results.json``, a safetensors file for each network (it loads into the plain model),
and plots.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fipoptim import Solver
from fipoptim.secondary import SparseProjection
from recipes.common import report, stored
from recipes.common.augment import augmentation
from recipes.common.data import DataError, load_task
from recipes.common.options import (
    Distinct,
    add_data_options,
    add_method_option,
    add_run_options,
    number,
    run_recipe,
    usable_device,
)
from recipes.common.recipe_settings import add_settings_options, given_settings, option_kinds
from recipes.sparsify import tables
from recipes.sparsify.dense import load_dense
from recipes.sparsify.experiment import SparsifyExperiment
from recipes.sparsify.methods import METHODS
from recipes.sparsify.methods.path import PathOptions
from recipes.sparsify.networks import NETWORKS, Network
from recipes.sparsify.results import RECIPE, report_results
from recipes.sparsify.settings import SparsifySettings

PROGRAM = f"python -m recipes.{RECIPE}"
DEFAULT_METHODS = ("fip", "gradual-distillation", "one-shot")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    return run_recipe(lambda: _main(argv), PROGRAM, "keeps the methods that were finished")


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    name = arguments.network or _network_of(parser, arguments.data)
    network = NETWORKS[name]
    data = arguments.data or network.data[0]
    if data not in network.data:
        parser.error(
            f"argument --data: {name} takes {' or '.join(network.data)}, got {data!r}; "
            f"choose another --network ({', '.join(NETWORKS)})"
        )
    settings, sparsities = _settings(parser, arguments, network)
    device = usable_device(parser, arguments.device)
    checkpoint = None
    try:
        if arguments.checkpoint is not None:
            checkpoint = load_dense(arguments.checkpoint, network.build())
        task = load_task(data, data_root=arguments.data_root, download=arguments.download)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if arguments.validation > 0:
        task = task.held_out(arguments.validation)
    if settings.anchors is not None and settings.anchors > len(task.train_inputs):
        parser.error(
            f"argument --anchors: {settings.anchors} is more than the {len(task.train_inputs)} "
            f"training inputs of {data}"
        )
    seeds = arguments.seeds or [arguments.seed]
    methods = list(METHODS) if "all" in arguments.method else list(dict.fromkeys(arguments.method))
    config = {
        "network": name,
        "data": data,
        **stored.identity(arguments.checkpoint),
        "dense_epochs": network.dense_epochs,
        "dense_batch_size": network.dense_batch_size,
        "validation": arguments.validation,
        "sparsities": list(sparsities),
        **settings.flat(),
    }
    experiment = SparsifyExperiment(
        network,
        task.to(device),
        sparsities,
        settings,
        methods,
        checkpoint=checkpoint,
        augment=augmentation(data),
        config=config,
        out=arguments.out,
        environment=report.environment(device),
        progress=arguments.progress,
    )
    experiment.prepare(parser, seeds, resume=arguments.resume)
    plan = tables.plan(methods, sparsities, settings, rewinds=checkpoint is None)
    print(f"{plan}\n", flush=True)
    try:
        records = experiment.run(seeds, methods)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    report_results(experiment, records, seeds, export=arguments.export)
    return 0


def _network_of(parser: argparse.ArgumentParser, data: str | None) -> str:
    if data is None:
        return next(iter(NETWORKS))
    fitting = [name for name, network in NETWORKS.items() if data in network.data]
    if not fitting:
        known = ", ".join(d for network in NETWORKS.values() for d in network.data)
        parser.error(f"argument --data: unknown data set {data!r}: choose from {known}")
    return fitting[0]


def _defaults(network: Network) -> SparsifySettings:
    """The default settings of a network, with the options of every method that is registered."""
    return network.settings.completed(option_kinds(METHODS.values()))


def _settings(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, network: Network
) -> tuple[SparsifySettings, list[float]]:
    """The network's defaults, changed by the command line, and the sparsities; checked before anything is loaded."""
    defaults = _defaults(network)
    settings = defaults.changed(
        per_layer=arguments.per_layer,
        keep=tuple(arguments.keep),
        **given_settings(arguments, defaults, option_kinds(METHODS.values())),
    )
    sparsities = sorted(set(arguments.sparsity or network.sparsities))
    model = network.build()
    for sparsity in sparsities:
        try:
            SparseProjection(model, sparsity, per_layer=settings.per_layer, keep=settings.keep)
        except ValueError as error:
            option, _, message = str(error).partition(": ")
            parser.error(f"argument --{option}: {message}")
    path = settings.of(PathOptions)
    try:
        Solver(products=path.products, max_products=path.max_products)
    except ValueError as error:
        parser.error(f"argument --{error}")
    return settings, sparsities


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Take weights out of a trained network while it keeps its function.",
        epilog=f"Defaults in brackets are those for {' / '.join(NETWORKS)}.",
    )
    data = parser.add_argument_group("network and data")
    data.add_argument("--network", choices=list(NETWORKS), help="[that of --data, else digits-mlp]")
    data.add_argument(
        "--data", metavar="NAME", help="digits, mnist, fashion-mnist or cifar10 [the network's]"
    )
    add_data_options(data)
    data.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a trained dense network, as safetensors or a torch state dict [trained here]",
    )
    sparse = parser.add_argument_group("sparsity")
    sparse.add_argument(
        "--sparsity",
        type=number,
        nargs="+",
        metavar="P",
        action=Distinct,
        help="shares of the prunable weights that are to be zero, visited in increasing order, with waypoints if "
        "they are far apart "
        + "["
        + " / ".join(" ".join(f"{s:g}" for s in n.sparsities) for n in NETWORKS.values())
        + "]",
    )
    sparse.add_argument(
        "--per-layer",
        action="store_true",
        help="every layer gets the sparsity by itself",
    )
    sparse.add_argument(
        "--keep", nargs="+", default=[], metavar="LAYER", help="layers that are not pruned"
    )
    run = parser.add_argument_group("run")
    add_method_option(run, METHODS, list(DEFAULT_METHODS))
    add_run_options(run, RECIPE)
    run.add_argument(
        "--export",
        action="store_true",
        help="also write weights, masks and a compressed form of the networks of the first seed",
    )

    defaults = [_defaults(network) for network in NETWORKS.values()]
    add_settings_options(parser, defaults, option_kinds(METHODS.values()))
    return parser
