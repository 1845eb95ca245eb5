"""Settings that are options of the command line: default, help text and argument type of each stand in one place.

A frozen dataclass declares its fields with :func:`option`. :func:`add_options` makes a command-line option of each, and
:func:`given_options` reads back those that were given.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_HELP, _KEYWORDS = "help", "keywords"


def option(help: str, *, default: Any = dataclasses.MISSING, **keywords: Any) -> Any:
    """A field of a settings dataclass that is an option of the command line.

    Args:
        help: What ``--help`` says; the defaults are added in brackets.
        default: The field's default. Without one, whoever makes the settings must give the value.
        keywords: For ``argparse``: ``type``, ``choices``, ``metavar``, ``action``, ``nargs``.
    """
    return dataclasses.field(default=default, metadata={_HELP: help, _KEYWORDS: keywords})


def shown(value: Any) -> str:
    """A default as ``--help`` shows it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def add_options(
    group: argparse._ArgumentGroup,
    kind: type[Any],
    defaults: Sequence[Any],
    *,
    prefix: str = "",
    title: str = "",
    without: type[Any] | None = None,
    show: Callable[[Any], str] = shown,
) -> None:
    """Adds an option for each field of a settings class that :func:`option` made.

    An option that is not given is absent from the parsed arguments, so defaults may be chosen after parsing.

    Args:
        group: The group under which ``--help`` lists them.
        kind: The class.
        defaults: Instances of the class whose values ``--help`` shows as defaults, one for each kind of data.
        prefix: Before each option's name: ``"ewc-"`` makes ``--ewc-lr`` of the field ``lr``.
        title: Before each help text.
        without: A base of the class whose fields are left out; they have been added to another group.
        show: Turns a default into text.
    """
    left_out = {field.name for field in _options(without)}
    for field in _options(kind):
        if field.name not in left_out:
            values = " / ".join(show(getattr(settings, field.name)) for settings in defaults)
            group.add_argument(
                f"--{prefix}{field.name.replace('_', '-')}",
                default=argparse.SUPPRESS,
                help=f"{title}{field.metadata[_HELP]} [{values}]",
                **field.metadata[_KEYWORDS],
            )


def given_options(
    arguments: argparse.Namespace, kind: type[Any], *, prefix: str = ""
) -> dict[str, Any]:
    """The options of a settings class, inherited ones included, that were given on the command line."""
    values = vars(arguments)
    names = {f"{prefix.replace('-', '_')}{field.name}": field.name for field in _options(kind)}
    return {name: values[key] for key, name in names.items() if key in values}


def _options(kind: type[Any] | None) -> Iterator[dataclasses.Field[Any]]:
    if kind is not None:
        yield from (field for field in dataclasses.fields(kind) if _HELP in field.metadata)
