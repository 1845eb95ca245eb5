"""Look at the metric's spectrum, and at how far a network may move: ``python -m recipes.spectrum --help``.

The metric of a network says which directions of weight space its outputs depend on. Its leading eigenvalues, the
density of all of them and the effective dimension are measured before and after training, layer by layer, and along a
path; and how far the network may move along several directions before its outputs do, and how much of a new task's
gradient is sensitive.

The recipe writes to ``--out``: ``results.json``, ``spectrum.png`` of the first seed, and for each seed the trained
network and a file for each measurement.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.common import report
from recipes.common.data import DataError
from recipes.common.options import (
    add_data_options,
    add_run_options,
    run_recipe,
    usable_device,
)
from recipes.common.recipe_settings import add_settings_options, given_settings, option_kinds
from recipes.finetune.texts import FORTUNES
from recipes.spectrum import figures
from recipes.spectrum.experiment import SpectrumExperiment
from recipes.spectrum.measurements import MEASUREMENTS
from recipes.spectrum.networks import NETWORKS
from recipes.spectrum.networks.network import Given
from recipes.spectrum.settings import SpectrumSettings
from recipes.spectrum.spectra import without_nodes

RECIPE = "spectrum"
PROGRAM = f"python -m recipes.{RECIPE}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    return run_recipe(lambda: _main(argv), PROGRAM, "keeps the measurements that were finished")


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    kind, kinds = NETWORKS[arguments.network], option_kinds(MEASUREMENTS.values())
    defaults = kind.settings.completed(kinds)
    settings = defaults.changed(**_tuples(given_settings(arguments, defaults, kinds)))
    chosen = arguments.measure
    measured = list(MEASUREMENTS) if "all" in chosen else list(dict.fromkeys(chosen))
    device = usable_device(parser, arguments.device)
    _check_checkpoint(parser, arguments, needed=kind.needs_checkpoint)
    given = Given(
        arguments.data_root, arguments.download, arguments.checkpoint, arguments.texts, device
    )
    try:
        network = kind(given, settings)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    config = {"network": arguments.network, **network.identity, **settings.flat()}
    environment = report.environment(device)
    experiment = SpectrumExperiment(
        network,
        settings,
        config=config,
        out=arguments.out,
        environment=environment,
        progress=arguments.progress,
    )
    seeds = arguments.seeds or [arguments.seed]
    experiment.prepare(parser, seeds, resume=arguments.resume)
    try:
        records = experiment.run(seeds, measured)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    for name, runs in records.items():
        print(f"\n{MEASUREMENTS[name].title}\n\n{MEASUREMENTS[name].table(runs)}")
    report.write_results(
        arguments.out / "results.json",
        recipe=RECIPE,
        config={**config, "seeds": seeds},
        environment=environment,
        metrics={
            name: [
                {"seed": seed, **_without_config(run)}
                for seed, run in zip(seeds, runs, strict=True)
            ]
            for name, runs in records.items()
        },
    )
    figures.draw(arguments.out / "spectrum.png", {name: runs[0] for name, runs in records.items()})
    print(f"\nresults.json and spectrum.png are in {arguments.out}")
    return 0


def _without_config(record: dict[str, Any]) -> dict[str, Any]:
    """A record for ``results.json``, which has configuration and environment once."""
    left_out = ("config", "environment")
    found: dict[str, Any] = without_nodes({k: v for k, v in record.items() if k not in left_out})
    return found


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The same values, with tuples in place of lists."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def _check_checkpoint(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, *, needed: bool
) -> None:
    if not needed:
        if arguments.checkpoint is not None:
            parser.error(f"argument --checkpoint: {arguments.network} is trained here")
    elif arguments.checkpoint is None:
        parser.error(
            f"argument --checkpoint: {arguments.network} needs the file of a trained network"
        )
    elif not arguments.checkpoint.is_file():
        parser.error(f"argument --checkpoint: cannot be read: {arguments.checkpoint} is no file")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Look at the metric's spectrum, and at how far a network may move.",
        epilog=f"Defaults in brackets are those for {' / '.join(NETWORKS)}.",
    )
    data = parser.add_argument_group("network and data")
    data.add_argument("--network", choices=list(NETWORKS), default="digits", help="[%(default)s]")
    add_data_options(data, validation=False)
    data.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="the trained network of resnet20, as safetensors or a torch state dict",
    )
    data.add_argument(
        "--texts",
        type=Path,
        default=FORTUNES,
        metavar="DIR",
        help="for minilm-lora a folder of texts, one file a kind [%(default)s]",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--measure",
        choices=[*MEASUREMENTS, "all"],
        nargs="+",
        default=["all"],
        metavar="NAME",
        help=f"{', '.join(MEASUREMENTS)}, or all [all]",
    )
    add_run_options(run, RECIPE)
    kinds = option_kinds(MEASUREMENTS.values())
    defaults: list[SpectrumSettings] = [n.settings.completed(kinds) for n in NETWORKS.values()]
    add_settings_options(parser, defaults, kinds)
    return parser
