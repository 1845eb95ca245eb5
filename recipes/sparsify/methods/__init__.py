"""The pruning methods: a file each, and a line each in ``METHODS``."""

from recipes.sparsify.methods.gradual import Gradual, GradualDistillation
from recipes.sparsify.methods.lottery_ticket import LotteryTicket
from recipes.sparsify.methods.method import Method
from recipes.sparsify.methods.one_shot import OneShot, RandomMasks
from recipes.sparsify.methods.path import InvariantPath

METHODS: dict[str, type[Method]] = {
    "fip": InvariantPath,
    "gradual-distillation": GradualDistillation,
    "gradual": Gradual,
    "lottery-ticket": LotteryTicket,
    "one-shot": OneShot,
    "random": RandomMasks,
}
