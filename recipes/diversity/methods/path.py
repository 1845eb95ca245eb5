"""Functionally invariant paths: far away from the start network first, then from one member to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from recipes.common.data import Task
from recipes.common.options import COUNT, RATE
from recipes.common.process_memory import give_back
from recipes.common.settings import option
from recipes.diversity.held_function import FunctionOptions, member_state, moving_copy
from recipes.diversity.methods.method import Method
from recipes.diversity.objectives.objective import Loss, Objective, ObjectiveOptions
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.source import EnsembleSource, Member

ANCHORS_AT_ONCE = 500  # anchors whose outputs are computed at a time


@dataclass(frozen=True, kw_only=True)
class PathOptions:
    """The options of all paths."""

    group: ClassVar[str] = "functionally invariant paths"

    straight_eps: float = option("length of a step without objective", default=1.0, **RATE)
    straight_away: int = option(
        "steps without objective to the first member, before those of --away", default=60, **COUNT
    )
    straight_between: int = option(
        "steps without objective from one member to the next", default=10, **COUNT
    )
    straight_products: int = option(
        "metric products of a step without objective", default=8, **COUNT
    )
    # The length is in Adam's geometry and falls before each member.
    eps: float = option(
        "length of a step on an objective, or back to the function", default=1.5, **RATE
    )

    def straight_steps_to(self, member: int) -> int:
        """The number of steps without objective to the member of that index, from the member before."""
        return self.straight_away if member == 0 else self.straight_between


class InvariantPath(Method):
    """A path on which the start network's function stays.

    Args:
        title: The name in tables and plots.
        straight: Whether the path to the first member begins with steps that have no objective (L = 0): as straight as
            the function allows. A path that never has an objective begins so to every member.
        objective: The objective of the other steps; None lets them restore the function.
    """

    own_option_kinds = (FunctionOptions, ObjectiveOptions, PathOptions)
    is_path = True

    def __init__(
        self, title: str, *, straight: bool = False, objective: Objective | None = None
    ) -> None:
        super().__init__(title, objective)
        self.straight = straight

    def phases(
        self, settings: EnsembleSettings, member: int
    ) -> list[tuple[Literal["straight", "turn"], int]]:
        """The parts of the path to a member from the member before, and the number of steps of each."""
        turn = settings.of(ObjectiveOptions).steps_to(member)
        if self.straight and (member == 0 or self.objective is None):
            straight = settings.of(PathOptions).straight_steps_to(member)
            return [("straight", straight), ("turn", turn)]
        return [("turn", turn)]

    def total_steps(self, task: Task, settings: EnsembleSettings) -> int:
        """See :class:`Method`."""
        members = range(settings.members)
        return sum(steps for k in members for _, steps in self.phases(settings, k))

    def members(self, source: EnsembleSource, files: Sequence[Path]) -> Iterator[Member]:
        """Walks the path."""
        settings, options = source.settings, source.settings.of(PathOptions)
        generator = torch.Generator().manual_seed(source.seed)
        model = moving_copy(source)
        anchors = _anchors(model, source, generator)
        straight = FIPOptimizer(
            model.parameters(),
            anchors,
            eps=options.straight_eps,
            solver=Solver(products=options.straight_products),
            generator=generator,
        )
        # There are so many of these steps, each on a new batch, that products are not worth their time.
        turning = FIPOptimizer(
            model.parameters(),
            anchors,
            beta=1.0 if self.objective is None else self.objective.weight(settings),
            eps=options.eps,
            momentum=0.9,
            precondition="adam",
            solver=Solver(products=0),
            generator=generator,
        )
        shares = settings.of(ObjectiveOptions)
        length = 0.0
        for member in range(settings.members):
            loss = None
            if self.objective is not None:
                loss = self.objective.next_loss(model, files, source, generator)
            for phase, steps in self.phases(settings, member):
                optimizer = straight if phase == "straight" else turning
                for t in range(steps):
                    optimizer.zero_grad()
                    if phase == "turn":
                        _set_length(optimizer, options.eps * shares.step_share(member, t))
                        _set_gradient(optimizer, loss)
                    optimizer.step()
                    assert optimizer.last_step is not None
                    length += optimizer.last_step.step_norm
                    give_back(t)
                    source.progress(1, f"drift {optimizer.last_step.drift:.3g}")
            yield Member(member_state(model, source, generator), length)


def _anchors(
    model: torch.nn.Module, source: EnsembleSource, generator: torch.Generator
) -> AnchorBatch:
    options, inputs = source.settings.of(FunctionOptions), source.task.train_inputs
    count = options.anchors or len(inputs)
    drawn = torch.randperm(len(inputs), generator=generator)[:count]
    return AnchorBatch(
        model,
        inputs[drawn.to(inputs.device)],
        output=options.output_space,
        batch_size=min(options.anchor_batch, len(drawn)),
        chunk_size=max(ANCHORS_AT_ONCE, options.anchor_batch),
        augment=source.augment,
        generator=generator,
    )


def _set_length(optimizer: FIPOptimizer, length: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = length


def _set_gradient(optimizer: FIPOptimizer, loss: Loss | None) -> None:
    """Sets the gradient of a step; without a loss it is zero, and the step only restores the function."""
    if loss is not None:
        loss().backward()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
