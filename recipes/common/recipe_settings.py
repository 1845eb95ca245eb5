"""Settings in two parts: the options that all methods of a recipe share, and those that one method owns.

A method's options are a dataclass beside the method, and several methods may share it. Names are unique among all the
options of a recipe, because the command line and ``results.json`` know no groups.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

from recipes.common.settings import add_options, given_options, shown

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """The settings of a recipe. A subclass adds the options that all methods share as fields.

    Attributes:
        method_options: Objects of the dataclasses in which methods own their options, at most one of each dataclass.
    """

    method_options: tuple[Any, ...] = ()

    def of(self, kind: type[Options]) -> Options:
        """The options of a dataclass: those in ``method_options``, or else its defaults.

        Raises:
            TypeError: If there are none in ``method_options``, and a field has no default.
        """
        for options in self.method_options:
            if type(options) is kind:
                found: Options = options
                return found
        return kind()

    def completed(self, kinds: Iterable[type[Any]]) -> Self:
        """The same settings, with the defaults of each dataclass of which ``method_options`` has no object."""
        there = {type(options) for options in self.method_options}
        added = [kind() for kind in dict.fromkeys(kinds) if kind not in there]
        return dataclasses.replace(self, method_options=(*self.method_options, *added))

    def changed(self, **values: Any) -> Self:
        """The same settings with other values, given by name whether they are shared or a method's own.

        Raises:
            TypeError: If no option has such a name.
        """
        unknown = set(values).difference(self.flat())
        if unknown:
            raise TypeError(f"no option is named {', '.join(sorted(unknown))}")
        own = tuple(_replaced(options, values) for options in self.method_options)
        return _replaced(self, {**values, "method_options": own})

    def flat(self) -> dict[str, Any]:
        """All options by name, shared ones first."""
        return {
            field.name: getattr(options, field.name)
            for options in (self, *self.method_options)
            for field in dataclasses.fields(options)
            if field.name != "method_options"
        }


def option_kinds(methods: Iterable[Any]) -> list[type[Any]]:
    """The dataclasses in the ``option_kinds`` of all methods, each once."""
    return list(dict.fromkeys(kind for method in methods for kind in method.option_kinds))


def add_settings_options(
    parser: argparse.ArgumentParser, defaults: Sequence[RecipeSettings], kinds: Iterable[type[Any]]
) -> None:
    """Adds the options of a recipe: a group for those that all methods share, and one for each dataclass.

    Args:
        parser: The parser of the command line.
        defaults: Settings of one class whose values ``--help`` shows as defaults, one for each kind of data.
        kinds: The dataclasses of the methods' own options. Their attribute ``group`` is the title of the group.
    """
    shared = parser.add_argument_group("all methods")
    add_options(shared, type(defaults[0]), defaults, show=shown_default)
    for kind in kinds:
        own = parser.add_argument_group(getattr(kind, "group", kind.__name__))
        add_options(own, kind, [settings.of(kind) for settings in defaults], show=shown_default)


def given_settings(
    arguments: argparse.Namespace, settings: RecipeSettings, kinds: Iterable[type[Any]]
) -> dict[str, Any]:
    """The options that were given on the command line, by name, whether they are shared or a method's own."""
    found: dict[str, Any] = {}
    for kind in (type(settings), *kinds):
        found |= given_options(arguments, kind)
    return found


def shown_default(value: Any) -> str:
    """A default as ``--help`` shows it. None is shown as all, since it stands for all inputs."""
    if isinstance(value, tuple):
        return " ".join(map(shown_default, value))
    if isinstance(value, float):
        return f"{value:.3g}"
    return "all" if value is None else shown(value)


def _replaced(options: Options, values: Mapping[str, Any]) -> Options:
    """A dataclass object with those of the values that are fields of it in place of its own."""
    names = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    found = {name: value for name, value in values.items() if name in names}
    return dataclasses.replace(options, **found)  # type: ignore[type-var]
