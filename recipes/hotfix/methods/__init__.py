"""The methods that make a network right on a few inputs: a file each, and a line each in the registry below.

A method's file holds its options, too. Command line and tables read the registry, so a new method is one new file and
one call of :func:`register`.
"""

from recipes.hotfix.methods.distillation import Distillation
from recipes.hotfix.methods.interpolation import Interpolation
from recipes.hotfix.methods.kfac import KFAC
from recipes.hotfix.methods.l2sp import L2SP
from recipes.hotfix.methods.method import Method
from recipes.hotfix.methods.path import InvariantPath
from recipes.hotfix.methods.plain import FineTuning

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
register("plain", FineTuning())
register("distillation", Distillation())
register("l2sp", L2SP())
register("interpolation", Interpolation())
register("kfac", KFAC())
