"""The command line of the recipes that run ``learners``: which methods, and every setting of theirs."""

from __future__ import annotations

import argparse
import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from recipes.common.options import fraction, number, or_none, positive, products, whole
from recipes.continual import learners
from recipes.continual.learners import METHODS, SCHEDULES

COUNT: dict[str, Any] = {"type": whole(1), "metavar": "N"}
RATE: dict[str, Any] = {"type": positive, "metavar": "X"}
MOMENTUM: dict[str, Any] = {"type": or_none(fraction), "metavar": "X"}
MOMENTUM_OF = {
    "Adam": "Adam's first beta; none lets it cycle",
    "Muon": "Muon's momentum; none is 0.95",
}
S = TypeVar("S", bound=learners.Settings)


def add_method_option(group: argparse._ArgumentGroup, default: Sequence[str]) -> None:
    """``--method``: one or several, or all."""
    group.add_argument(
        "--method",
        choices=[*METHODS, "all"],
        nargs="+",
        default=default,
        metavar="NAME",
        help=f"{', '.join(METHODS)}, or all [{' '.join(default)}]",
    )


def chosen_methods(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """The methods asked for; where one cannot run here, the parser ends the program and says why."""
    asked = METHODS if "all" in arguments.method else dict.fromkeys(arguments.method)
    for method, needs in learners.missing(asked).items():
        parser.error(
            f"argument --method: {method} needs {needs}, which is not installed: "
            "pip install 'fipoptim[bench]'"
        )
    return list(asked)


class SettingOptions:
    """Adds options for fields of :class:`recipes.continual.learners.Settings` that say their defaults.

    Args:
        defaults: The defaults to say, one for each kind of data.
    """

    def __init__(self, defaults: Iterable[learners.Settings]) -> None:
        self.defaults = list(defaults)

    def add(
        self,
        group: argparse._ArgumentGroup,
        option: str,
        help: str,
        *,
        default: Callable[[Any], Any] | None = None,
        **keywords: Any,
    ) -> None:
        """One option, absent from the namespace unless given; ``default`` reads it from the settings."""
        read = default or operator.attrgetter(option.removeprefix("--").replace("-", "_"))
        shown = " / ".join(
            "none" if d is None else f"{d:g}" if isinstance(d, float) else f"{d}"
            for d in map(read, self.defaults)
        )
        group.add_argument(option, default=argparse.SUPPRESS, help=f"{help} [{shown}]", **keywords)

    def add_learners(self, parser: argparse.ArgumentParser) -> None:
        """The options of all methods, the path's last."""
        others = parser.add_argument_group("other methods")
        for key, method in METHODS.items():
            if method.steps_by is not None:
                text = f"{method.title}: {method.steps_by}'s highest learning rate"
                self._tuned(others, key, "lr", text, RATE)
                text = f"{method.title}: {MOMENTUM_OF[method.steps_by]}"
                self._tuned(others, key, "momentum", text, MOMENTUM)
            if method.strength is not None:
                number_of = {"type": number, "metavar": "X"}
                text = f"{method.title}: {method.strength}"
                self._tuned(others, key, "strength", text, number_of)
        self._path(parser.add_argument_group("functionally invariant path"))

    def _tuned(
        self, group: argparse._ArgumentGroup, method: str, part: str, help: str, how: dict[str, Any]
    ) -> None:
        def default(settings: learners.Settings) -> Any:
            return getattr(settings.tuning[method], part)

        self.add(group, f"--{method}-{part}", help, default=default, **how)

    def _path(self, path: argparse._ArgumentGroup) -> None:
        self.add(path, "--anchors", "training inputs of a task whose outputs are held", **COUNT)
        path.add_argument(
            "--augment",
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            help="make the anchors of each step many: affine maps, mixed in pairs (distillation gets the same)",
        )
        self.add(
            path,
            "--anchor-batch",
            "anchors of each step, or none for all",
            type=or_none(whole(1)),
            metavar="N",
        )
        self.add(
            path,
            "--output-space",
            "what of the output is held",
            choices=["logits", "probabilities"],
        )
        self.add(path, "--beta", "weight of the new task", **RATE)
        self.add(path, "--eps", "length of a step, at the top of its schedule", **RATE)
        self.add(path, "--schedule", "course of the step length", choices=list(SCHEDULES))
        self.add(
            path,
            "--momentum",
            "share of the last step's gradient that is kept",
            type=fraction,
            metavar="X",
        )
        self.add(
            path,
            "--precondition",
            "geometry of the step",
            type=or_none(str),
            choices=["adam", "muon", None],
            metavar="{adam,muon,none}",
        )
        self.add(
            path,
            "--products",
            "metric products a step: a number, or adaptive",
            type=products,
            metavar="N",
        )
        self.add(path, "--max-products", "most products of an adaptive step", **COUNT)
        self.add(
            path,
            "--radius",
            "how far a step may move the outputs on the anchors",
            type=or_none(positive),
            metavar="X",
        )
        self.add(
            path,
            "--max-drift",
            "bound that drift on the anchors never passes",
            type=or_none(positive),
            metavar="X",
        )


def settings_from(parser: argparse.ArgumentParser, arguments: argparse.Namespace, defaults: S) -> S:
    """The defaults, and over them what the command line says.

    Where anchors are too few for ``--anchor-batch``, the parser ends the program and says so.
    """
    values = vars(arguments)
    names = {field.name for field in dataclasses.fields(defaults)}
    given = {name: value for name, value in values.items() if name in names}
    tuning = {}
    for method, tuned in defaults.tuning.items():
        option = method.replace("-", "_")
        parts = {f"{option}_{field.name}": field.name for field in dataclasses.fields(tuned)}
        changed = {part: values[name] for name, part in parts.items() if name in values}
        tuning[method] = dataclasses.replace(tuned, **changed)
    settings = dataclasses.replace(defaults, **given, tuning=tuning)
    batch, count = settings.anchor_batch, settings.anchors
    if batch is not None and batch > count and not settings.augment:
        if "anchor_batch" in given:
            parser.error(
                f"argument --anchor-batch: {batch} is more than the {count} anchors "
                "(--augment makes them many)"
            )
        settings = dataclasses.replace(settings, anchor_batch=None)
    return settings
