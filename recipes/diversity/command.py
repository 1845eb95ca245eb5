"""Make an ensemble from one trained network and attack it: ``python -m recipes.diversity --help``.

From a trained network, paths lead far through weight space on which the function on clean inputs stays: with no
objective (L = 0, as straight as the function allows), with input gradients turned away from the start network's and the
other members', with both in turn, or with outputs that do not follow what fools the start network and the others.
Networks on the way are the ensemble. Other ways to as many networks are run beside it, and all are attacked alike: by
what fools the start network (transfer), each member for itself, and the joint ensemble.

Left in ``--out``: ``results.json``, a safetensors file for each member, and plots: ``attacks.png``, ``weights.png``,
``coherence.png``, ``layers.png`` and ``pictures.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.common import stored
from recipes.common.checkpoints import load_weights
from recipes.common.data import DataError, load_task
from recipes.common.options import (
    add_data_options,
    add_run_options,
    fraction,
    number,
    or_none,
    positive,
    run_recipe,
    usable_device,
    whole,
)
from recipes.diversity.experiment import RECIPE, Experiment
from recipes.diversity.networks import NETWORKS, Attacks, Network
from recipes.diversity.settings import BASELINES, PATHS, WAYS, Settings

PROGRAM = f"python -m recipes.{RECIPE}"
DEFAULT_WAYS = ("withstand", "independent")


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
    ways = _ways(parser, arguments)
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
    if settings.anchors is not None and settings.anchors > len(task.train_inputs):
        parser.error(
            f"argument --anchors: {settings.anchors} is more than the {len(task.train_inputs)} "
            f"training inputs of {network.data}"
        )
    config = {
        "network": name,
        "data": network.data,
        **stored.identity(arguments.checkpoint),
        "validation": arguments.validation,
        **dataclasses.asdict(settings),
        **dataclasses.asdict(attacks),
    }
    experiment = Experiment(
        network,
        task.to(device),
        settings,
        attacks,
        arguments.checkpoint,
        config,
        arguments.out,
    )
    seeds = arguments.seeds or [arguments.seed]
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.resume:
            experiment.check_resumable(seeds)
        else:
            experiment.clear(seeds)
        for seed in seeds:
            experiment.run(seed, ways, resume=arguments.resume, progress=arguments.progress)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {arguments.out}: {error.strerror}")
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    experiment.report(seeds, ways, device)
    return 0


def _ways(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """The ways asked for, paths first: weight noise is as long as they are."""
    asked = set(arguments.objective)
    asked |= set(BASELINES) if "all" in arguments.baseline else set(arguments.baseline)
    if not asked:
        parser.error("name an --objective or a --baseline")
    walked = arguments.resume and any(any(arguments.out.glob(f"seed-*/{p}.json")) for p in PATHS)
    if "noise" in asked and not walked and not asked & set(PATHS):
        parser.error("argument --baseline: noise is as long as a path: name an --objective too")
    return [way for way in WAYS if way in asked]


def _settings(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, network: Network
) -> tuple[Settings, Attacks]:
    """The network's defaults, and over them what the command line says; checked before anything is loaded."""

    def given(kind: type[Any]) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(kind)}
        return {key: value for key, value in vars(arguments).items() if key in names}

    settings = dataclasses.replace(network.settings, **given(Settings))
    attacks = dataclasses.replace(network.attacks, **given(Attacks))
    # No two that the results would call the same.
    sizes = {f"{size:.6g}": size for size in (*attacks.attack_eps, attacks.table_eps)}
    eps = tuple(sorted(sizes.values()))
    attacks = dataclasses.replace(attacks, attack_eps=eps)
    for value in eps:
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
    what = parser.add_argument_group("network and data")
    what.add_argument("--network", choices=list(NETWORKS), help="[that of --data, else digits-mlp]")
    known = list(dict.fromkeys(network.data for network in NETWORKS.values()))
    what.add_argument("--data", choices=known, help="[the network's]")
    add_data_options(what)
    what.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="a trained start network [trained here]"
    )
    where = parser.add_argument_group("run")
    where.add_argument(
        "--objective",
        nargs="*",
        choices=PATHS,
        default=[way for way in DEFAULT_WAYS if way in PATHS],
        metavar="NAME",
        help=f"what moves the path: {', '.join(PATHS)}, or several [withstand]",
    )
    where.add_argument(
        "--baseline",
        nargs="*",
        choices=[*BASELINES, "all"],
        default=[way for way in DEFAULT_WAYS if way in BASELINES],
        metavar="NAME",
        help=f"other ways: {', '.join(BASELINES)}, all, or nothing [independent]",
    )
    add_run_options(where, RECIPE)

    def setting(option: str, help: str, **keywords: Any) -> None:
        name = option.removeprefix("--").replace("-", "_")
        defaults = [
            getattr(n.settings if hasattr(n.settings, name) else n.attacks, name)
            for n in NETWORKS.values()
        ]
        shown = " / ".join(
            "all"
            if d is None
            else " ".join(f"{e:.3g}" for e in d)
            if isinstance(d, tuple)
            else f"{d:.3g}"
            if isinstance(d, float)
            else f"{d}"
            for d in defaults
        )
        group.add_argument(option, default=argparse.SUPPRESS, help=f"{help} [{shown}]", **keywords)

    count = {"type": whole(1), "metavar": "N"}
    rate = {"type": positive, "metavar": "X"}
    group = parser.add_argument_group("all ways")
    setting("--members", "networks of an ensemble", type=whole(2), metavar="N")
    setting("--epochs", "epochs of a network trained from scratch", **count)
    setting("--batch-size", "inputs of a training step", **count)
    setting("--lr", "Adam's highest learning rate in training from scratch", **rate)
    group = parser.add_argument_group("functionally invariant paths")
    setting(
        "--anchors",
        "training inputs that hold the function, or none for all",
        type=or_none(whole(1)),
        metavar="N",
    )
    setting("--anchor-batch", "of them in each step", **count)
    setting("--output-space", "in which it is held", choices=["logits", "probabilities"])
    setting(
        "--batch-statistics",
        "batch norm by each batch's statistics on the way, measured anew for each member",
        action=argparse.BooleanOptionalAction,
    )
    setting("--straight-eps", "length of a step without objective", **rate)
    setting("--straight-away", "steps of that, then those of --away, to the first member", **count)
    setting("--straight-between", "steps of that from one member to the next", **count)
    setting("--straight-products", "metric products of each", **count)
    setting("--eps", "length of a step on an objective, or back to the function", **rate)
    setting("--away", "steps of that to the first member", **count)
    setting("--between", "steps of that from one member to the next", **count)
    setting("--between-share", "of their length, or of the learning rate, there", **rate)
    setting("--beta", "weight of the likeness of input gradients", **rate)
    setting("--withstand-beta", "weight of what attacks change", **rate)
    setting(
        "--withstand-eps", "largest change of a pixel by these attacks", type=fraction, metavar="X"
    )
    setting("--objective-batch", "inputs of an objective, each step", **count)
    setting(
        "--noise",
        "largest change of a pixel by noise where gradients are compared",
        type=fraction,
        metavar="X",
    )
    setting("--others", "earlier members to differ from, at most", type=whole(0), metavar="N")
    group = parser.add_argument_group("other ways")
    setting("--distillation-lr", "Adam's highest learning rate on the same objectives", **rate)
    setting("--cycle-epochs", "epochs of a cycle of fast geometric ensembling", **rate)
    setting("--cycle-lr", "its highest learning rate", **rate)
    group = parser.add_argument_group("attacks")
    setting("--attack-eps", "largest changes of a pixel", type=number, nargs="+", metavar="X")
    setting(
        "--table-eps", "the one of attacks on the ensembles themselves", type=number, metavar="X"
    )
    setting("--attack-images", "test images attacked on the start network", **count)
    setting("--white-box-images", "test images attacked on each ensemble", **count)
    setting(
        "--auto-attack-images",
        "test images for AutoAttack; 0 leaves it out",
        type=whole(0),
        metavar="N",
    )
    setting("--attack-steps", "steps of an attack", **count)
    setting("--attack-restarts", "random starts of an attack", **count)
    return parser
