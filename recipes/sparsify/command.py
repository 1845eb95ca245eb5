"""Take weights out of a trained network while it keeps its function: ``python -m recipes.sparsify --help``.

From a dense network a functionally invariant path leads to networks of which a given share of the weights is exactly
zero, by stages between which there may be waypoints. The secondary objective is the distance to the nearest sparse
network, nearest in the anchors' metric; what is kept are the dense network's outputs on training inputs, and no label
is read. With ``--products 0``, the default of the larger networks, Adam takes the steps on drift and distance, and
tables and plots call it so. Other ways to sparse networks are run beside it, from the same dense network.

Left in ``--out``: ``results.json``, a safetensors file for each network (it loads into the plain model), and plots.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fipoptim import Solver
from fipoptim.secondary import SparseProjection
from recipes.common import report, stored
from recipes.common.augment import augmentation
from recipes.common.data import DataError, load_task
from recipes.common.options import (
    Distinct,
    add_data_options,
    add_run_options,
    fraction,
    number,
    or_none,
    positive,
    products,
    run_recipe,
    usable_device,
    whole,
)
from recipes.sparsify import tables as sparsify_tables
from recipes.sparsify.experiment import RECIPE, Experiment
from recipes.sparsify.networks import NETWORKS, Network, load_dense
from recipes.sparsify.pruning import METHODS, Settings

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
        **dataclasses.asdict(settings),
    }
    experiment = Experiment(
        network,
        task.to(device),
        sparsities,
        settings,
        augmentation(data),
        config,
        arguments.out,
        report.environment(device),
    )
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.resume:
            experiment.check_resumable(seeds, methods)
        else:
            experiment.clear(seeds, methods)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {arguments.out}: {error.strerror}")
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    plan = sparsify_tables.plan(methods, sparsities, settings, rewinds=checkpoint is None)
    print(f"{plan}\n", flush=True)
    try:
        for seed in seeds:
            experiment.run(
                seed,
                methods,
                checkpoint,
                resume=arguments.resume,
                progress=arguments.progress,
            )
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    experiment.report(seeds, methods, export=arguments.export)
    return 0


def _network_of(parser: argparse.ArgumentParser, data: str | None) -> str:
    if data is None:
        return next(iter(NETWORKS))
    fitting = [name for name, network in NETWORKS.items() if data in network.data]
    if not fitting:
        known = ", ".join(d for network in NETWORKS.values() for d in network.data)
        parser.error(f"argument --data: unknown data set {data!r}: choose from {known}")
    return fitting[0]


def _settings(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, network: Network
) -> tuple[Settings, list[float]]:
    """The network's defaults, and over them what the command line says; checked before anything is loaded."""
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    given["keep"] = tuple(arguments.keep)
    settings = dataclasses.replace(network.settings, **given)
    sparsities = sorted(set(arguments.sparsity or network.sparsities))
    model = network.build()
    for sparsity in sparsities:
        try:
            SparseProjection(model, sparsity, per_layer=settings.per_layer, keep=settings.keep)
        except ValueError as error:
            option, _, message = str(error).partition(": ")
            parser.error(f"argument --{option}: {message}")
    try:
        Solver(products=settings.products, max_products=settings.max_products)
    except ValueError as error:
        parser.error(f"argument --{error}")
    return settings, sparsities


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Take weights out of a trained network while it keeps its function.",
        epilog=f"Defaults in brackets are those for {' / '.join(NETWORKS)}.",
    )
    what = parser.add_argument_group("network and data")
    what.add_argument("--network", choices=list(NETWORKS), help="[that of --data, else digits-mlp]")
    what.add_argument(
        "--data", metavar="NAME", help="digits, mnist, fashion-mnist or cifar10 [the network's]"
    )
    add_data_options(what)
    what.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a trained dense network, as safetensors or a torch state dict [trained here]",
    )
    sparse = parser.add_argument_group("what is taken out")
    sparse.add_argument(
        "--sparsity",
        type=number,
        nargs="+",
        metavar="P",
        action=Distinct,
        help="shares of the prunable weights that are to be zero, visited in increasing order, with waypoints where "
        "they are far apart "
        + "["
        + " / ".join(" ".join(f"{s:g}" for s in n.sparsities) for n in NETWORKS.values())
        + "]",
    )
    sparse.add_argument(
        "--per-layer",
        action="store_true",
        default=argparse.SUPPRESS,
        help="every layer gets the sparsity by itself",
    )
    sparse.add_argument(
        "--keep", nargs="+", default=[], metavar="LAYER", help="layers that are not pruned"
    )
    where = parser.add_argument_group("run")
    where.add_argument(
        "--method",
        nargs="+",
        choices=[*METHODS, "all"],
        default=list(DEFAULT_METHODS),
        metavar="NAME",
        help=f"{', '.join(METHODS)}, or all [{' '.join(DEFAULT_METHODS)}]",
    )
    add_run_options(where, RECIPE)
    where.add_argument(
        "--export",
        action="store_true",
        help="also write weights, masks and a compressed form of the networks of the first seed",
    )

    def setting(option: str, help: str, **keywords: Any) -> None:
        name = option.removeprefix("--").replace("-", "_")
        defaults = [getattr(n.settings, name) for n in NETWORKS.values()]
        shown = " / ".join(
            {None: "all", True: "yes", False: "no"}.get(d, f"{d}")
            if d is None or isinstance(d, bool)
            else f"{d:g}"
            if isinstance(d, float)
            else f"{d}"
            for d in defaults
        )
        group.add_argument(option, default=argparse.SUPPRESS, help=f"{help} [{shown}]", **keywords)

    count = {"type": whole(1), "metavar": "N"}
    rate = {"type": positive, "metavar": "X"}
    switch = {"action": argparse.BooleanOptionalAction}
    group = parser.add_argument_group("all methods")
    setting("--epochs", "epochs for each stage of the path", **count)
    setting(
        "--baseline-epochs",
        "epochs in the baselines, for each stage that the path takes to a sparsity",
        **count,
    )
    setting("--waypoints", "visit sparsities between those that are far apart", **switch)
    setting("--batch-size", "inputs of a step", **count)
    setting("--baseline-lr", "Adam's highest learning rate in the baselines", **rate)
    setting("--mask-every", "steps between two choices of the weights to keep", **count)
    setting(
        "--anchors",
        "training inputs to prune with, or none for all",
        type=or_none(whole(1)),
        metavar="N",
    )
    setting(
        "--augment",
        "whose inputs are shifted (and flipped): nobody's, those that go with labels, or all",
        choices=["none", "labels", "all"],
    )
    setting("--mirror", "inputs that are not augmented are mirrored, too", **switch)
    setting("--autocast", "minibatches in bfloat16", **switch)
    setting("--temperature", "at which outputs are compared", **rate)
    group = parser.add_argument_group("functionally invariant path")
    setting("--choose", "what the weights to keep are largest in", choices=["metric", "magnitude"])
    setting("--beta", "weight of the distance to the sparse network", **rate)
    setting("--lr", "Adam's highest learning rate for the dense network, with no products", **rate)
    setting(
        "--products",
        "metric products a step: 0, a number, or adaptive",
        type=products,
        metavar="N",
    )
    setting("--max-products", "most products of an adaptive step", **count)
    setting("--eps", "length of a step with products, at the top of its schedule", **rate)
    setting("--probes", "random pullbacks of an estimate of the metric", **count)
    setting("--metric-batch", "inputs of an estimate of the metric", **count)
    setting("--metric-decay", "of the running mean of estimates", type=fraction, metavar="X")
    setting("--labels", "also follow the labels", **switch)
    return parser
