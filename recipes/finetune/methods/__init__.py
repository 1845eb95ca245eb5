"""The methods that fine-tune a network: a file each, and a line each in the registry below.

A method's file holds its options, too. Command line and tables read the registry, so a new method is one new file and
one call of :func:`register`.
"""

from recipes.finetune.methods.distillation import Distillation
from recipes.finetune.methods.interpolation import Interpolation
from recipes.finetune.methods.l2sp import L2SP
from recipes.finetune.methods.method import Method
from recipes.finetune.methods.path import InvariantPath
from recipes.finetune.methods.plain import FineTuning

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
register("distillation", Distillation())
register("l2-sp", L2SP())
register("interpolation", Interpolation())
register("plain", FineTuning())
