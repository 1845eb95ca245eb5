"""The pruning methods: a file each, and a line each in the registry below.

A method's file holds its options, too. Command line, tables and figures read the registry, so a new method is one new
file and one call of :func:`register`.
"""

from recipes.sparsify.methods.gradual import Gradual, GradualDistillation, GradualFeatures
from recipes.sparsify.methods.layerwise import Layerwise
from recipes.sparsify.methods.lottery_ticket import LotteryTicket
from recipes.sparsify.methods.method import Method
from recipes.sparsify.methods.one_shot import OneShot, RandomMasks
from recipes.sparsify.methods.path import InvariantPath

METHODS: dict[str, type[Method]] = {}


def register(name: str, method: type[Method]) -> None:
    """Adds a method under the name that the command line and files know it by.

    Raises:
        ValueError: If there is a method of that name.
    """
    if name in METHODS:
        raise ValueError(f"name: a method {name!r} is registered already.")
    METHODS[name] = method


register("fip", InvariantPath)  # the order of the command line
register("gradual-distillation", GradualDistillation)
register("gradual-features", GradualFeatures)
register("gradual", Gradual)
register("lottery-ticket", LotteryTicket)
register("layer-by-layer", Layerwise)
register("one-shot", OneShot)
register("random", RandomMasks)
