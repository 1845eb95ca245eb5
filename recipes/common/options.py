"""What the command lines of all recipes share: common options, and argument types that check a value."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch


class Distinct(argparse.Action):
    """Stores the values of an option and refuses a value that is given twice: it would count twice in every mean."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Stores the values, or names the one that is given twice."""
        for k, value in enumerate(values):
            if value in values[:k]:
                raise argparse.ArgumentError(self, f"{value} is given twice; give each value once")
        setattr(namespace, self.dest, values)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argument type: an integer of at least ``least``, at most ``most``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: give a whole number {bounds}"
            )
        return value

    return parse


SEED = whole(0, 2**32 - 1)


def positive(text: str) -> float:
    """An argument type: a finite number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is out of range: give a number above 0")
    return value


def fraction(text: str) -> float:
    """An argument type: a number of at least 0 and below 1."""
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: give 0 or more, less than 1")
    return value


def number(text: str) -> float:
    """An argument type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def products(text: str) -> str | int:
    """An argument type: a number of metric products, or the word adaptive."""
    return text if text == "adaptive" else whole(0)(text)


def automatic(text: str) -> str | float:
    """An argument type: a finite number above 0, or the word auto."""
    return text if text == "auto" else positive(text)


def or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argument type: what ``parse`` takes, or the word none."""
    return lambda text: None if text == "none" else parse(text)


# For options whose values are as common as these.
COUNT: dict[str, Any] = {"type": whole(1), "metavar": "N"}
RATE: dict[str, Any] = {"type": positive, "metavar": "X"}
NUMBER: dict[str, Any] = {"type": number, "metavar": "X"}


def usable_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device of that name; if it cannot be used, the parser ends the program and says why."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(
            f"argument --device: {name!r} cannot be used here: {str(error).splitlines()[0]}"
        )
    return device


def run_recipe(recipe: Callable[[], int], program: str, kept: str) -> int:
    """Runs a recipe and returns its exit status; after Ctrl-C it says how to go on and returns 130.

    Args:
        recipe: Runs the recipe and returns the exit status.
        program: The command that started it.
        kept: The part of the message after "go on with --resume, which": what is kept or lost.
    """
    try:
        return recipe()
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; go on with --resume, which {kept}", file=sys.stderr)
        return 130


def add_data_options(group: argparse._ArgumentGroup, *, validation: bool = True) -> None:
    """``--data-root``, ``--download`` and, unless it is left out, ``--validation``."""
    group.add_argument(
        "--data-root",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="folder of torchvision's data sets [%(default)s]",
    )
    group.add_argument("--download", action="store_true", help="fetch data that is not there")
    if validation:
        group.add_argument(
            "--validation",
            type=fraction,
            default=0.0,
            metavar="SHARE",
            help="test on this share of the training inputs, held out, instead of the test set: for choosing settings",
        )


def add_method_option(
    group: argparse._ArgumentGroup, methods: Collection[str], default: Sequence[str]
) -> None:
    """``--method``: several names of methods, or all."""
    group.add_argument(
        "--method",
        choices=[*methods, "all"],
        nargs="+",
        default=default,
        metavar="NAME",
        help=f"{', '.join(methods)}, or all [{' '.join(default)}]",
    )


def add_run_options(group: argparse._ArgumentGroup, recipe: str) -> None:
    """``--seed`` or ``--seeds``, ``--device``, ``--out``, ``--resume`` and ``--no-progress``."""
    seed = group.add_mutually_exclusive_group()
    seed.add_argument("--seed", type=SEED, default=0, help="[%(default)s]")
    seed.add_argument(
        "--seeds",
        type=SEED,
        nargs="+",
        action=Distinct,
        metavar="SEED",
        help="several, one run each",
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... [%(default)s]")
    group.add_argument(
        "--out", type=Path, default=Path("runs") / recipe, metavar="DIR", help="[%(default)s]"
    )
    group.add_argument(
        "--no-progress", dest="progress", action="store_false", help="no progress bars"
    )
    group.add_argument(
        "--resume", action="store_true", help="keep what an interrupted run in --out has finished"
    )
