"""The command line of the continual-learning recipes, assembled from the registered methods, and its settings."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from recipes.common.settings import add_options, given_options
from recipes.continual.methods import METHODS, missing, options_of
from recipes.continual.settings import ContinualSettings

S = TypeVar("S", bound=ContinualSettings)


def chosen_methods(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """The methods asked for; if one cannot run here, the parser ends the program and says why."""
    asked = METHODS if "all" in arguments.method else dict.fromkeys(arguments.method)
    for method, needs in missing(asked).items():
        parser.error(
            f"argument --method: {method} needs {needs}, which is not installed: "
            "pip install 'fipoptim[bench]'"
        )
    return list(asked)


def add_settings_options(
    parser: argparse.ArgumentParser, defaults: Sequence[ContinualSettings]
) -> None:
    """The options of a recipe's settings, in groups: training, remembered inputs, the path, and the other methods.

    Args:
        parser: Gets the options.
        defaults: Settings of one class whose values ``--help`` shows as defaults, one for each kind of data.
    """
    kind = type(defaults[0])
    add_options(parser.add_argument_group("training"), kind, defaults, without=ContinualSettings)
    add_options(parser.add_argument_group("remembered inputs"), ContinualSettings, defaults)
    others = None
    for method in sorted(METHODS.values(), key=lambda method: method.prefixed):
        if method.prefixed and others is None:
            others = parser.add_argument_group("other methods")
        add_options(
            others or parser.add_argument_group(method.title),
            method.options,
            [options_of(method.name, settings) for settings in defaults],
            prefix=method.prefix,
            title=f"{method.title}: " if method.prefixed else "",
        )


def settings_from(parser: argparse.ArgumentParser, arguments: argparse.Namespace, defaults: S) -> S:
    """The defaults, with what the command line says in their place.

    If anchors are too few for ``--anchor-batch``, or options of a method do not go together, the parser ends the
    program and says so.
    """
    methods = {
        method.name: dataclasses.replace(
            options_of(method.name, defaults),
            **given_options(arguments, method.options, prefix=method.prefix),
        )
        for method in METHODS.values()
    }
    given = given_options(arguments, type(defaults))
    settings = dataclasses.replace(defaults, methods=methods, **given)
    batch, count = settings.anchor_batch, settings.anchors
    if batch is not None and batch > count and not settings.augment:
        if "anchor_batch" in given:
            parser.error(
                f"argument --anchor-batch: {batch} is more than the {count} anchors "
                "(--augment makes them many)"
            )
        settings = dataclasses.replace(settings, anchor_batch=None)
    for method in METHODS.values():
        if (fault := method.fault(methods[method.name], settings)) is not None:
            parser.error(f"argument --{fault}")
    return settings


def config_of(settings: ContinualSettings) -> dict[str, Any]:
    """The settings as files hold them: plain values, and the options of each method.

    The options of the invariant path stand beside the recipe's own; those of every other method under ``tuning`` and
    the method's name.
    """
    config = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name != "methods"
    }
    tuning = {}
    for method in METHODS.values():
        options = dataclasses.asdict(options_of(method.name, settings))
        if method.prefixed:
            tuning[method.name] = options
        else:
            config |= options
    return {**config, "tuning": tuning}
