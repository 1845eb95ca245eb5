"""The path: steps of FIPOptimizer on the labels of all classes, and a settlement for each budget at the end."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.geometry import GEOMETRIES
from recipes.common.networks import path_groups
from recipes.common.options import COUNT, RATE, automatic, fraction, or_none, products, whole
from recipes.common.progress import Progress
from recipes.common.settings import option
from recipes.update.case import AT_ONCE, Case
from recipes.update.learning import learn
from recipes.update.methods.method import Method, Update, percent
from recipes.update.settings import UpdateSettings


@dataclass(frozen=True)
class PathOptions:
    """The options of the path.

    Attributes:
        anchors: Training inputs that the old network gets right, whose outputs are held.
        anchor_batch: Anchors of a step.
        beta: The weight of the labels' loss, or ``"auto"``, which the loosest budget chooses.
        eps: The length of a step, at the top of one cycle.
        momentum: The decay of the running mean of gradients.
        precondition: The geometry of a step.
        products: Metric products of a step; 0 takes steps without any.
        settle_products: The most products of each settlement.
    """

    group: ClassVar[str] = "path"
    anchors: int = option(
        "training inputs that the old network gets right and whose outputs are held", **COUNT
    )
    anchor_batch: int = option("anchors of a step", **COUNT)
    beta: float | str = option(
        "weight of the labels' loss, or auto", default="auto", type=automatic, metavar="X"
    )
    eps: float = option("length of a step, at the top of one cycle", default=0.3, **RATE)
    momentum: float = option("decay of the mean of gradients", default=0.9, type=fraction)
    precondition: str | None = option(
        "geometry of a step, or none",
        default="muon",
        type=or_none(str),
        choices=[None, *(name for name in GEOMETRIES if name is not None)],
        metavar="NAME",
    )
    products: str | int = option(
        "metric products of a step, or adaptive", default=0, type=products, metavar="N"
    )
    settle_products: int = option(
        "most metric products of a settlement", default=16, type=whole(0), metavar="N"
    )


class InvariantPath(Method):
    """Steps that hold what the old network gets right, and then :meth:`FIPOptimizer.settle`, anew for each budget.

    The outputs are compared as probabilities of all classes. The old network gives 0 to the new ones, so that the
    budget counts an input of an old class that is taken for a new one, as any other change.
    """

    title = "path, with a budget"
    option_kinds = (PathOptions,)

    def names(self, settings: UpdateSettings) -> Sequence[str]:
        """A network for each budget."""
        return [percent(budget) for budget in settings.max_flips]

    def epochs(self, settings: UpdateSettings) -> float:
        """See :class:`Method`."""
        return settings.epochs

    def run(
        self, case: Case, settings: UpdateSettings, *, seed: int, progress: Progress
    ) -> list[Update]:
        """See :class:`Method`; the account is of the settlement. All budgets begin with the same training."""
        own = settings.of(PathOptions)
        model = copy.deepcopy(case.start)
        drawn = torch.randperm(len(case.right), generator=torch.Generator().manual_seed(seed))
        anchors = AnchorBatch(
            model,
            case.right[drawn[: own.anchors]],
            check=case.check,
            reference=case.old,
            output="probabilities",
            batch_size=min(own.anchor_batch, own.anchors, len(drawn)),
            chunk_size=AT_ONCE,
            augment=case.augment,
            generator=torch.Generator().manual_seed(seed),
        )
        optimizer = FIPOptimizer(
            path_groups(model),
            anchors,
            beta=own.beta,
            eps=own.eps,
            momentum=own.momentum,
            max_flips=max(settings.max_flips),
            check_every=None,
            precondition=own.precondition,
            solver=Solver(products=own.products),
        )
        steps = self.steps(case, settings)
        trained = learn(
            model,
            case.task,
            optimizer,
            OneCycleLR(optimizer, max_lr=own.eps, total_steps=steps + 1, cycle_momentum=False),
            lambda x, z, labels: F.cross_entropy(z, labels),
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            augment=case.augment,
            freeze_batch_norm=True,  # the budget is that of eval mode
            seed=seed,
            progress=progress,
        )
        weights = copy.deepcopy(model.state_dict())
        state = copy.deepcopy(optimizer.state_dict())
        found = []
        for budget in settings.max_flips:
            model.load_state_dict(weights)
            optimizer.load_state_dict(copy.deepcopy(state))
            optimizer.max_flips = budget
            progress(0, f"settling to {percent(budget)}")
            settled = optimizer.settle(own.settle_products)
            account = {
                "beta": optimizer.param_groups[0]["beta"],
                "flips_before": settled.before.flips,
                "flips_after": settled.after.flips,
                "went_back": settled.went_back,
                "products": settled.products,
                "settle_seconds": settled.seconds,
                "told": str(settled),
            }
            found.append(
                Update(
                    percent(budget),
                    copy.deepcopy(model).eval(),
                    steps * settings.batch_size,
                    trained.seconds + settled.seconds,
                    budget,
                    account,
                )
            )
        return found
