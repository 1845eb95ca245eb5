"""Fine-tune a pretrained network while what it says of everything else stays: ``python -m recipes.finetune --help``.

A text encoder learns to tell new kinds of text apart. Its embeddings of other texts are held on unlabelled anchors, so
that search indexes built on them keep working. A budget says how far the embeddings of check texts may move, and the
network that is left is within it. Other methods do the same beside it, in the same CPU time. All networks are measured
on texts that no method was given.

The recipe writes to ``--out``: ``results.json``, ``trade_off.png``, and for each seed the result of each method.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from recipes.common import processes, report
from recipes.common.data import DataError
from recipes.common.options import (
    add_data_options,
    add_method_option,
    add_run_options,
    run_recipe,
    usable_device,
)
from recipes.common.recipe_settings import add_settings_options, given_settings, option_kinds
from recipes.finetune import figures, tables
from recipes.finetune.experiment import FinetuneExperiment
from recipes.finetune.image_problem import EFFICIENTNET, ImageProblem
from recipes.finetune.methods import METHODS
from recipes.finetune.networks import MINILM, is_causal
from recipes.finetune.problem import Problem
from recipes.finetune.settings import FinetuneSettings
from recipes.finetune.setups import IMAGES, LORA, WHOLE
from recipes.finetune.text_problem import EncoderProblem, LanguageProblem
from recipes.finetune.texts import FORTUNES

RECIPE = "finetune"
PROGRAM = f"python -m recipes.{RECIPE}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    with processes.joined():
        return run_recipe(lambda: _main(argv), PROGRAM, "keeps the methods that were finished")


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    kinds = option_kinds(METHODS.values())
    of_text = WHOLE if arguments.adapter == "none" else LORA
    defaults = _defaults(IMAGES if arguments.model == EFFICIENTNET else of_text)
    settings = defaults.changed(**given_settings(arguments, defaults, kinds))
    if arguments.model == EFFICIENTNET and arguments.adapter == "lora":
        parser.error(f"argument --adapter: all weights of {EFFICIENTNET} are trained; give none")
    methods = list(METHODS) if "all" in arguments.method else list(dict.fromkeys(arguments.method))
    _check_shares(parser, settings)
    device = usable_device(parser, processes.device_of(parser, arguments.device))
    seeds = arguments.seeds or [arguments.seed]
    try:
        problem = _problem(arguments, settings, device)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    config = {**problem.identity, **settings.flat()}
    environment = {**report.environment(device), "processes": processes.ranks().size}
    experiment = FinetuneExperiment(
        problem,
        settings,
        config=config,
        out=arguments.out,
        environment=environment,
        progress=arguments.progress,
    )
    experiment.prepare(parser, seeds, resume=arguments.resume)
    try:
        records = experiment.run(seeds, methods)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if processes.ranks().rank != 0:
        return 0
    print(f"\n{tables.table(records)}")
    report.write_results(
        arguments.out / "results.json",
        recipe=RECIPE,
        config={**config, "seeds": seeds},
        environment=environment,
        metrics=tables.metrics(records),
    )
    figures.trade_off(arguments.out / "trade_off.png", records)
    if "fip" in records:
        for seed, record in zip(seeds, records["fip"], strict=True):
            for point in record["points"]:
                print(
                    f"\nseed {seed}, {tables.named(record['title'], point['choice'])}\n{point['text']}"
                )
    print(f"\nresults.json and trade_off.png are in {arguments.out}")
    return 0


def _check_shares(parser: argparse.ArgumentParser, settings: FinetuneSettings) -> None:
    """Refuses fewer of anything than there are processes to share it; the parser ends the program and says why."""
    size = processes.ranks().size
    for name in ("batch_size", "train", "anchors", "anchor_batch", "check"):
        if getattr(settings, name) < size:
            parser.error(
                f"argument --{name.replace('_', '-')}: {getattr(settings, name)} cannot be shared by {size} processes; "
                "give at least one for each"
            )


def _problem(
    arguments: argparse.Namespace, settings: FinetuneSettings, device: torch.device
) -> Problem:
    if arguments.model == EFFICIENTNET:
        return ImageProblem(
            arguments.data_root,
            settings,
            download=arguments.download,
            development=arguments.development,
            device=device,
        )
    kind = LanguageProblem if is_causal(arguments.model) else EncoderProblem
    return kind(
        arguments.model,
        arguments.adapter or "lora",
        arguments.texts,
        arguments.kinds,
        settings,
        development=arguments.development,
        device=device,
    )


def _defaults(settings: FinetuneSettings) -> FinetuneSettings:
    """The settings with the options of every method that is registered."""
    return settings.completed(option_kinds(METHODS.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Fine-tune a pretrained network while what it says of everything else stays.",
        epilog=f"Several processes: torchrun --nproc-per-node 2 -m recipes.{RECIPE} ...; they share each batch and the "
        "anchors, on CPUs, or with --device cuda on a GPU each. "
        f"Defaults in brackets are those for texts with LoRA / with all weights / for {EFFICIENTNET}.",
    )
    data = parser.add_argument_group("network and data")
    data.add_argument(
        "--model",
        default=MINILM,
        metavar="NAME",
        help="minilm; or the folder or the hub's name of a Hugging Face encoder or causal language model; or "
        f"{EFFICIENTNET}, for images [%(default)s]",
    )
    data.add_argument(
        "--adapter",
        choices=["lora", "none"],
        help="train LoRA's matrices, or all weights [lora for texts, none for images]",
    )
    data.add_argument(
        "--texts",
        type=Path,
        default=FORTUNES,
        metavar="DIR",
        help="folder of text files, one a kind [%(default)s]",
    )
    data.add_argument(
        "--kinds",
        nargs="+",
        metavar="NAME",
        help="kinds that are learnt; the others are to stay [ten of fortunes; of another folder the ten largest, or "
        "half of all if that is less]",
    )
    add_data_options(data, validation=False)
    data.add_argument(
        "--development",
        action="store_true",
        help="leave the inputs that are kept for results alone and measure on others: for choosing settings",
    )
    run = parser.add_argument_group("run")
    add_method_option(run, METHODS, list(METHODS))
    add_run_options(run, RECIPE)
    defaults = [_defaults(settings) for settings in (LORA, WHOLE, IMAGES)]
    add_settings_options(parser, defaults, option_kinds(METHODS.values()))
    return parser
