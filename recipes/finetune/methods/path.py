"""The path: steps of FIPOptimizer with a budget of drift, and a settlement at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fipoptim import FIPOptimizer, Solver
from fipoptim.geometry import GEOMETRIES
from recipes.common import processes
from recipes.common.options import RATE, automatic, fraction, or_none, products, whole
from recipes.common.settings import option
from recipes.finetune.anchoring import anchors_of
from recipes.finetune.case import Case, Examples, shared_loss
from recipes.finetune.methods.method import Choice, Method, Training, trained
from recipes.finetune.settings import FinetuneSettings


@dataclass(frozen=True)
class PathOptions:
    """The options of the path.

    Attributes:
        max_drift: The budgets, a run each.
        beta: The weight of the new examples' loss, or ``"auto"``.
        eps: The greatest length of a step.
        momentum: The decay of the running mean of gradients.
        precondition: The geometry of a step.
        products: Metric products of a step.
        settle_products: The most products with which ``settle()`` restores the function.
        share_of_steps: The share of the time that steps may take; the rest is for settling.
    """

    group: ClassVar[str] = "path"
    max_drift: tuple[float, ...] = option(
        "budgets: drift of the check inputs, a run each", default=(0.02,), nargs="+", **RATE
    )
    beta: float | str = option(
        "weight of the new examples' loss, or auto", default="auto", type=automatic, metavar="X"
    )
    eps: float = option("greatest length of a step", default=0.5, **RATE)
    momentum: float = option("decay of the mean of gradients", default=0.9, type=fraction)
    precondition: str | None = option(
        "geometry of a step, or none",
        default="adam",
        type=or_none(str),
        choices=[None, *(name for name in GEOMETRIES if name is not None)],
        metavar="NAME",
    )
    products: str | int = option(
        "metric products of a step, or adaptive", default=0, type=products, metavar="N"
    )
    settle_products: int = option(
        "most products of the settlement", default=0, type=whole(0), metavar="N"
    )
    share_of_steps: float = option(
        "share of the time that steps may take", default=0.9, type=fraction
    )


class InvariantPath(Method):
    """Steps that hold the anchors, then :meth:`FIPOptimizer.settle`."""

    title = "path, with a budget"
    option_kinds = (PathOptions,)

    def choices(self, settings: FinetuneSettings) -> Sequence[Choice]:
        """The budgets."""
        return [{"max_drift": budget} for budget in settings.of(PathOptions).max_drift]

    def begin(
        self,
        model: nn.Module,
        case: Case,
        settings: FinetuneSettings,
        choice: Choice,
        *,
        seed: int,
    ) -> Training:
        """See :class:`Method`."""
        own = settings.of(PathOptions)
        anchors = anchors_of(model, case, settings, seed=seed, check=True)
        optimizer = FIPOptimizer(
            trained(model),
            anchors,
            beta=own.beta,
            eps=own.eps,
            momentum=own.momentum,
            max_drift=choice["max_drift"],
            check_every=None,
            precondition=own.precondition,
            solver=Solver(products=own.products),
            form="finite-difference",  # products are few, and a trace takes as long as many steps
        )
        return PathTraining(model, optimizer, own)


class PathTraining(Training):
    """The training of one network along a path.

    The first step knows the budget, by which it chooses the weight and remembers a network within. Further steps do
    without, as a budget bounds each step by another forward pass over its anchors. The settlement knows it again.

    Args:
        model: The network.
        optimizer: The optimizer.
        own: The options.
    """

    def __init__(self, model: nn.Module, optimizer: FIPOptimizer, own: PathOptions) -> None:
        self._model = processes.replicated(model)
        self._optimizer, self._eps = optimizer, own.eps
        self._budget = optimizer.max_drift
        self._settle_products, self.share_of_steps = own.settle_products, own.share_of_steps

    def step(self, batch: Examples, rate: float) -> None:
        """See :class:`Training`."""
        self._optimizer.param_groups[0]["lr"] = rate * self._eps
        self._optimizer.zero_grad()
        shared_loss(self._model, batch).backward()
        self._optimizer.step()
        self._optimizer.max_drift = None

    def finish(self) -> dict[str, Any]:
        """Settles."""
        self._optimizer.max_drift = self._budget
        found = self._optimizer.settle(self._settle_products)
        return {
            "beta": self._optimizer.param_groups[0]["beta"],
            "drift_before": found.before.drift,
            "drift_after": found.after.drift,
            "went_back": found.went_back,
            "restoring_steps": found.steps,
            "products": found.products,
        }
