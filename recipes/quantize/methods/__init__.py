"""The methods that quantize a network: a file each, and a line each in the registry below.

A method's file holds its options, too. Command line, tables and figures read the registry, so a new method is one new
file and one call of :func:`register`.
"""

from recipes.quantize.methods.distillation import Distillation
from recipes.quantize.methods.layerwise import Layerwise
from recipes.quantize.methods.method import Method
from recipes.quantize.methods.path import InvariantPath
from recipes.quantize.methods.rounding import Rounding

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
register("layerwise", Layerwise())
register("distillation", Distillation())
register("rounding", Rounding())
