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
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def add_options(
    group: argparse._ArgumentGroup,
    kind: type[Any],
    defaults: Sequence[Any],
    *,
    prefix: str = "",
    title: str = "",
    show: Callable[[Any], str] = shown,
) -> None:
    """Adds the options that a settings class declares itself, without those of its bases.

    An option that is not given is absent from the parsed arguments, so defaults may be chosen after parsing.

    Args:
        group: Where ``--help`` lists them.
        kind: The class.
        defaults: Settings whose values ``--help`` shows as defaults, one for each kind of data.
        prefix: Before each option's name: ``"ewc-"`` makes ``--ewc-lr`` of the field ``lr``.
        title: Before each help text.
        show: Turns a default into text.
    """
    inherited = {field.name for base in kind.__bases__ for field in _options(base)}
    for field in _options(kind):
        if field.name not in inherited:
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


def _options(kind: type[Any]) -> Iterator[dataclasses.Field[Any]]:
    if dataclasses.is_dataclass(kind):
        yield from (field for field in dataclasses.fields(kind) if _HELP in field.metadata)
