"""Make an ensemble from one trained network and attack it: ``python -m recipes.diversity --help``.

Functionally invariant paths lead from a trained network far through weight space, while the function on clean inputs
stays. The networks on a path are the members of an ensemble. A path has no objective (L = 0: it is as straight as the
function allows), or it turns input gradients away from those of the start network and of the other members, or both in
turn, or it keeps the outputs on images that fool the start network and the others. Other methods make as many networks,
and all ensembles are attacked alike: by images that fool the start network (transfer), member by member, and jointly.

The recipe writes to ``--out``: ``results.json``, a safetensors file for each member, and plots: ``attacks.png``,
``weights.png``, ``coherence.png``, ``layers.png`` and ``pictures.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from recipes.common import stored
from recipes.common.checkpoints import load_weights
from recipes.common.data import DataError, load_task
from recipes.common.options import add_data_options, add_run_options, run_recipe, usable_device
from recipes.common.recipe_settings import (
    add_settings_options,
    given_settings,
    option_kinds,
    shown_default,
)
from recipes.common.settings import add_options, given_options
from recipes.diversity.attack_settings import AttackSettings, size_name
from recipes.diversity.beyond import outside_images
from recipes.diversity.experiment import DiversityExperiment
from recipes.diversity.held_function import FunctionOptions
from recipes.diversity.methods import METHODS, baseline_names, path_names
from recipes.diversity.networks import NETWORKS, Network
from recipes.diversity.results import RECIPE, report_results
from recipes.diversity.settings import EnsembleSettings

PROGRAM = f"python -m recipes.{RECIPE}"
DEFAULT_PATHS, DEFAULT_BASELINES = ["withstand"], ["independent"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    return run_recipe(lambda: _main(argv), PROGRAM, "keeps the ensembles that were finished")


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    name = arguments.network or next(
        key for key, network in NETWORKS.items() if network.data == (arguments.data or "digits")
    )
    network = NETWORKS[name]
    if arguments.data not in (None, network.data):
        parser.error(f"argument --data: {name} takes {network.data}, got {arguments.data!r}")
    settings, attacks = _settings(parser, arguments, network)
    methods = _methods(parser, arguments)
    device = usable_device(parser, arguments.device)
    try:
        import torchattacks  # noqa: F401
    except ImportError:
        parser.error(
            "attacks need torchattacks, which is not installed: pip install 'fipoptim[recipes]'"
        )
    try:
        task = load_task(network.data, data_root=arguments.data_root, download=arguments.download)
        if arguments.validation > 0:
            task = task.held_out(arguments.validation)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if arguments.checkpoint is not None:
        try:
            load_weights(arguments.checkpoint, network.build())
        except DataError as error:
            parser.error(f"argument --checkpoint: {error}")
    anchors = settings.of(FunctionOptions).anchors
    if anchors is not None and anchors > len(task.train_inputs):
        parser.error(
            f"argument --anchors: {anchors} is more than the {len(task.train_inputs)} "
            f"training inputs of {network.data}"
        )
    outside = outside_images(task, arguments.data_root)
    config = {
        "network": name,
        "data": network.data,
        **stored.identity(arguments.checkpoint),
        "validation": arguments.validation,
        **settings.flat(),
        **dataclasses.asdict(attacks),
        "outside": outside.name,
    }
    experiment = DiversityExperiment(
        network,
        task.to(device),
        settings,
        attacks,
        outside,
        checkpoint=arguments.checkpoint,
        config=config,
        out=arguments.out,
        resume=arguments.resume,
        progress=arguments.progress,
    )
    seeds = arguments.seeds or [arguments.seed]
    experiment.prepare(parser, seeds, resume=arguments.resume)
    try:
        records = experiment.run(seeds, methods)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    report_results(experiment, records, seeds, device)
    return 0


def _methods(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """The methods asked for, paths first, because weight noise is as long as they are."""
    baselines = baseline_names() if "all" in arguments.baseline else arguments.baseline
    asked = {*arguments.objective, *baselines}
    if not asked:
        parser.error("name an --objective or a --baseline")
    paths = path_names()
    walked = arguments.resume and any(any(arguments.out.glob(f"seed-*/{p}.json")) for p in paths)
    if not walked and not asked.intersection(paths):
        for name in asked:
            if METHODS[name].needs_distances:
                parser.error(
                    f"argument --baseline: {name} is as long as a path: name an --objective too"
                )
    return [
        *(name for name in paths if name in asked),
        *(n for n in baseline_names() if n in asked),
    ]


def _defaults(network: Network) -> EnsembleSettings:
    """The default settings of a network, with the options of every method that is registered."""
    return network.settings.completed(option_kinds(METHODS.values()))


def _settings(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, network: Network
) -> tuple[EnsembleSettings, AttackSettings]:
    """The network's defaults, changed by the command line; checked before anything is loaded."""
    settings = _defaults(network)
    kinds = option_kinds(METHODS.values())
    settings = settings.changed(**given_settings(arguments, settings, kinds))
    attacks = dataclasses.replace(network.attacks, **given_options(arguments, AttackSettings))
    # Results know an attack by the name of its size, so no two sizes may have the same name.
    sizes = {size_name(size): size for size in (*attacks.attack_eps, attacks.table_eps)}
    attacks = dataclasses.replace(attacks, attack_eps=tuple(sorted(sizes.values())))
    for value in attacks.attack_eps:
        if not 0 <= value <= 1:
            parser.error(
                f"argument --attack-eps: {value:g} is out of range: give a share of the pixels' range, 0 to 1"
            )
    return settings, attacks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Make an ensemble from one trained network and attack it.",
        epilog=f"Defaults in brackets are those for {' / '.join(NETWORKS)}.",
    )
    data = parser.add_argument_group("network and data")
    data.add_argument("--network", choices=list(NETWORKS), help="[that of --data, else digits-mlp]")
    known = list(dict.fromkeys(network.data for network in NETWORKS.values()))
    data.add_argument("--data", choices=known, help="[the network's]")
    add_data_options(data)
    data.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="a trained start network [trained here]"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--objective",
        nargs="*",
        choices=path_names(),
        default=DEFAULT_PATHS,
        metavar="NAME",
        help=f"what moves the path: {', '.join(path_names())}, or several [{' '.join(DEFAULT_PATHS)}]",
    )
    run.add_argument(
        "--baseline",
        nargs="*",
        choices=[*baseline_names(), "all"],
        default=DEFAULT_BASELINES,
        metavar="NAME",
        help=f"other methods: {', '.join(baseline_names())}, all, or nothing [{' '.join(DEFAULT_BASELINES)}]",
    )
    add_run_options(run, RECIPE)

    defaults = [_defaults(network) for network in NETWORKS.values()]
    add_settings_options(parser, defaults, option_kinds(METHODS.values()))
    group = parser.add_argument_group("attacks")
    attacks = [network.attacks for network in NETWORKS.values()]
    add_options(group, AttackSettings, attacks, show=shown_default)
    return parser
