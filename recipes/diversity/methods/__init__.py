"""The methods that make an ensemble: a file each, and a line each in the registry below.

A method's file holds its options, too. Command line, tables and figures read the registry, so a new method is one new
file and one call of :func:`register`.
"""

from recipes.diversity.methods.distillation import Distillation
from recipes.diversity.methods.fast_geometric import FastGeometric
from recipes.diversity.methods.independent import Independent
from recipes.diversity.methods.method import Method
from recipes.diversity.methods.path import InvariantPath
from recipes.diversity.methods.weight_noise import WeightNoise
from recipes.diversity.objectives.far import Far
from recipes.diversity.objectives.misalign import Misalign
from recipes.diversity.objectives.withstand import Withstand

METHODS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Adds a method under the name that the command line and files know it by.

    Raises:
        ValueError: If there is a method of that name.
    """
    if name in METHODS:
        raise ValueError(f"name: a method {name!r} is registered already.")
    METHODS[name] = method


# The order of the command line, of the runs and of the tables.
register("none", InvariantPath("path, L = 0", straight=True))
register("far", InvariantPath("path, far away", objective=Far()))
register("misalign", InvariantPath("path, misaligned", objective=Misalign()))
register("both", InvariantPath("path, both", straight=True, objective=Misalign()))
register("withstand", InvariantPath("path, withstanding", objective=Withstand()))
register("independent", Independent("independent"))
register("fge", FastGeometric("fast geometric"))
register("distillation", Distillation("distilled, misaligned", objective=Misalign()))
register("adversarial", Distillation("distilled, withstanding", objective=Withstand()))
register("noise", WeightNoise("weight noise"))


def path_names() -> list[str]:
    """The names of the methods that are functionally invariant paths."""
    return [name for name, method in METHODS.items() if method.is_path]


def baseline_names() -> list[str]:
    """The names of the other methods."""
    return [name for name, method in METHODS.items() if not method.is_path]
