"""Settings that are options of the command line: each field says its default, its help text and how it is parsed.

A recipe's settings are the options that all its methods share, and one more dataclass of options for each method that
has some of its own. Names are unique among all of them, since the command line and ``results.json`` know no groups.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

Options = TypeVar("Options")


def option(help: str, *, default: Any = dataclasses.MISSING, **keywords: Any) -> Any:
    """A dataclass field that is also an option of the command line.

    Args:
        help: The help text of the option, without the default.
        default: The default of the field; without one, the field has to be given.
        keywords: What ``ArgumentParser.add_argument`` takes besides.
    """
    return dataclasses.field(default=default, metadata={"help": help, "keywords": keywords})


def add_options(
    group: argparse._ArgumentGroup, kind: type[Any], defaults: Sequence[Any], *, none: str = "all"
) -> None:
    """Adds the options of one dataclass; they are absent from the namespace unless they are given.

    Args:
        group: The group of the command line.
        kind: The dataclass.
        defaults: Objects that have its fields; their values are shown as the defaults, separated by slashes.
        none: How a default of None is shown.
    """
    for field in dataclasses.fields(kind):
        if "help" not in field.metadata:
            continue
        shown = " / ".join(_shown(getattr(values, field.name), none) for values in defaults)
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} [{shown}]",
            **field.metadata["keywords"],
        )


def _shown(value: Any, none: str) -> str:
    if value is None:
        return none
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple):
        return " ".join(_shown(part, none) for part in value)
    return f"{value}"


def changed(options: Options, values: Mapping[str, Any]) -> Options:
    """A dataclass object with those of ``values`` that are fields of it in place of its own."""
    names = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    return dataclasses.replace(options, **{k: v for k, v in values.items() if k in names})  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a recipe; a subclass adds the options that all methods share as fields.

    Attributes:
        method_options: Objects of the dataclasses in which methods own their options, at most one of each dataclass.
    """

    method_options: tuple[Any, ...] = ()

    def of(self, kind: type[Options]) -> Options:
        """The options of that dataclass: those in ``method_options``, or else its defaults.

        Raises:
            TypeError: If there are none in ``method_options`` and a field has no default.
        """
        for options in self.method_options:
            if type(options) is kind:
                found: Options = options
                return found
        return kind()

    def completed(self, kinds: Iterable[type[Any]]) -> Self:
        """The same settings with the defaults of every dataclass that ``method_options`` lacks."""
        own = {type(options): options for options in self.method_options}
        added = tuple(kind() for kind in dict.fromkeys(kinds) if kind not in own)
        return dataclasses.replace(self, method_options=(*self.method_options, *added))

    def changed(self, **values: Any) -> Self:
        """The same settings with other values, given by name whether they are shared or a method's own.

        Raises:
            TypeError: If no option has that name.
        """
        unknown = set(values).difference(self.names())
        if unknown:
            raise TypeError(f"no option is named {', '.join(sorted(unknown))}")
        own = tuple(changed(options, values) for options in self.method_options)
        return dataclasses.replace(changed(self, values), method_options=own)

    def names(self) -> list[str]:
        """The names of all options."""
        return list(self.flat())

    def flat(self) -> dict[str, Any]:
        """All options by name, shared ones first."""
        return {
            field.name: getattr(options, field.name)
            for options in (self, *self.method_options)
            for field in dataclasses.fields(options)
            if field.name != "method_options"
        }
