"""The methods that update a network to more classes: a file each, and a line each in the registry below.

A method's file holds its options, too. Command line, tables and figures read the registry, so a new method is one new
file and one call of :func:`register`.
"""

from recipes.update.methods.distillation import Distillation
from recipes.update.methods.ensemble import Ensemble
from recipes.update.methods.focal import FocalDistillation
from recipes.update.methods.interpolation import Interpolation
from recipes.update.methods.method import Method
from recipes.update.methods.path import InvariantPath
from recipes.update.methods.plain import PlainTraining

METHODS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Adds a method under the name that the command line and files know it by.

    Raises:
        ValueError: If there is a method of that name.
    """
    if name in METHODS:
        raise ValueError(f"name: a method {name!r} is registered already.")
    METHODS[name] = method


register("fip", InvariantPath())  # the order of the command line, of the runs and of the tables
register("plain", PlainTraining())
register("distillation", Distillation())
register("focal", FocalDistillation())
register("interpolation", Interpolation())
register("ensemble", Ensemble())
