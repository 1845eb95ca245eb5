"""The path: steps of FIPOptimizer with a budget of flips, and a settlement at the end."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.geometry import GEOMETRIES
from recipes.common.options import COUNT, RATE, automatic, fraction, or_none, products
from recipes.common.progress import Progress
from recipes.common.settings import option
from recipes.hotfix.case import AT_ONCE, Case
from recipes.hotfix.methods.method import Method, count_right, edit_loss, take_steps
from recipes.hotfix.settings import HotfixSettings


@dataclass(frozen=True)
class PathOptions:
    """The options of the path.

    Attributes:
        beta: The weight of the wrong inputs' loss, or ``"auto"``.
        eps: The length of a step.
        momentum: The decay of the running mean of gradients.
        precondition: The geometry of a step.
        products: Metric products of a step; 0 takes steps without any.
        rounds: How often steps and settlement take turns, if settling unlearns wrong inputs.
        margin: The probability that every wrong input has before settling.
    """

    group: ClassVar[str] = "path"
    beta: float | str = option(
        "weight of the wrong inputs' loss, or auto", default="auto", type=automatic, metavar="X"
    )
    eps: float = option("length of a step", default=0.03, **RATE)
    momentum: float = option("decay of the mean of gradients", default=0.0, type=fraction)
    precondition: str | None = option(
        "geometry of a step, or none",
        default=None,
        type=or_none(str),
        choices=[None, *(name for name in GEOMETRIES if name is not None)],
        metavar="NAME",
    )
    products: str | int = option(
        "metric products of a step, or adaptive", default=0, type=products, metavar="N"
    )
    rounds: int = option("settlements at most", default=5, **COUNT)
    margin: float = option(
        "probability of the right class to reach before settling", default=0.5, type=fraction
    )


class InvariantPath(Method):
    """Steps on the wrong inputs' loss that hold the anchors, then :meth:`FIPOptimizer.settle`.

    If settling unlearns some of the wrong inputs, more steps are taken from there. The network that is left is within
    the budget on the check inputs. It is the one with the most wrong inputs right.
    """

    title = "path, with a budget"
    option_kinds = (PathOptions,)

    def choices(self, settings: HotfixSettings) -> Sequence[Mapping[str, float]]:
        """One: nothing is chosen on the check inputs."""
        return [{}]

    def fix(
        self,
        model: nn.Module,
        case: Case,
        settings: HotfixSettings,
        choice: Mapping[str, float],
        *,
        seed: int,
        progress: Progress,
    ) -> tuple[int, dict[str, Any]]:
        """See :class:`Method`; the account is of each settlement."""
        own = settings.of(PathOptions)
        anchors = AnchorBatch(
            model,
            case.anchors,
            check=case.check,
            batch_size=settings.anchor_batch,
            chunk_size=AT_ONCE,
            augment=case.augment,
            generator=torch.Generator().manual_seed(seed),
        )
        opt = FIPOptimizer(
            model.parameters(),
            anchors,
            beta=own.beta,
            eps=own.eps,
            momentum=own.momentum,
            max_flips=settings.max_flips,
            check_every=None,
            precondition=own.precondition,
            solver=Solver(products=own.products),
        )

        def step() -> None:
            opt.zero_grad()
            edit_loss(model, case).backward()
            opt.step()

        taken, settled = 0, list[dict[str, Any]]()
        best = (-1, copy.deepcopy(model.state_dict()))
        for _ in range(own.rounds):
            taken += take_steps(
                model,
                case,
                step,
                most=settings.max_steps - taken,
                progress=progress,
                least=own.margin,
            )
            before = count_right(model, case)
            progress(0, "settling")
            found = opt.settle()
            right = count_right(model, case)
            settled.append(
                {
                    "after_steps": taken,
                    "right_before": before,
                    "right_after": right,
                    "flips_before": found.before.flips,
                    "flips_after": found.after.flips,
                    "went_back": found.went_back,
                    "restoring_steps": found.steps,
                    "seconds": found.seconds,
                }
            )
            if right > best[0]:
                best = (right, copy.deepcopy(model.state_dict()))
            if right == len(case.wrong_inputs) or taken >= settings.max_steps:
                break
        model.load_state_dict(best[1])
        return taken, {"beta": opt.param_groups[0]["beta"], "settled": settled}
