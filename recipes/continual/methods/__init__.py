"""The methods for learning one task after another: a file each, and a line each in the registry below.

A method's file holds its learner, its options for the command line and their defaults. Command lines, tables and
figures read the registry, so a new method is one new file and one call of :func:`register`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from recipes.continual.methods import (
    dark_experience,
    distillation,
    distillation_muon,
    ewc,
    fip,
    gem,
    lwf,
    plain,
    replay,
)
from recipes.continual.methods.base import Learner, Method
from recipes.continual.settings import ContinualSettings

METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Adds a method to those that the recipes can run.

    Raises:
        ValueError: If a method of that name is there already.
    """
    if method.name in METHODS:
        raise ValueError(f"name: a method {method.name!r} is registered already.")
    METHODS[method.name] = method


register(fip.METHOD)  # the order of the command line and of the tables
register(plain.METHOD)
register(distillation.METHOD)
register(distillation_muon.METHOD)
register(dark_experience.METHOD)
register(replay.METHOD)
register(ewc.METHOD)
register(gem.METHOD)
register(lwf.METHOD)


def options_of(method: str, settings: ContinualSettings) -> Any:
    """The options of a method: those that the settings give, or else the defaults of the method itself."""
    found = settings.methods.get(method)
    return METHODS[method].options() if found is None else found


def make_learner(
    method: str, model: nn.Module, settings: ContinualSettings, **keywords: Any
) -> Learner:
    """The learner of a method in ``METHODS``; ``keywords`` are those of :class:`Learner`."""
    return METHODS[method].learner(model, settings, options_of(method, settings), **keywords)


def missing(methods: Iterable[str]) -> dict[str, str]:
    """The methods that cannot run here, each with the distribution that is not installed."""
    needs = {method: METHODS[method].needs for method in methods}
    return {method: n.distribution for method, n in needs.items() if n is not None and n.missing()}
