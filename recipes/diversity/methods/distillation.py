"""Distillation: Adam minimises an objective and the change of the outputs, in as many steps as the path takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from fipoptim.anchors.output_space import output_map, squared_distance
from recipes.common.data import Task
from recipes.common.options import RATE
from recipes.common.process_memory import give_back
from recipes.common.settings import option
from recipes.diversity.held_function import FunctionOptions, member_state, moving_copy
from recipes.diversity.methods.method import Method
from recipes.diversity.objectives.objective import Objective, ObjectiveOptions
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.source import EnsembleSource, Member


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """The options of distillation."""

    group: ClassVar[str] = "distillation"

    distillation_lr: float = option(
        "Adam's highest learning rate in distillation", default=1e-3, **RATE
    )


class Distillation(Method):
    """Minimises what the path of the same objective minimises, by Adam.

    Args:
        title: The name in tables and plots.
        objective: The objective.
    """

    own_option_kinds = (FunctionOptions, ObjectiveOptions, DistillationOptions)

    def __init__(self, title: str, *, objective: Objective) -> None:
        super().__init__(title, objective)

    def total_steps(self, task: Task, settings: EnsembleSettings) -> int:
        """See :class:`Method`."""
        options = settings.of(ObjectiveOptions)
        return sum(options.steps_to(k) for k in range(settings.members))

    def members(self, source: EnsembleSource, files: Sequence[Path]) -> Iterator[Member]:
        """Goes on with the same network from one member to the next."""
        assert self.objective is not None
        settings, inputs = source.settings, source.task.train_inputs
        options, shares = settings.of(FunctionOptions), settings.of(ObjectiveOptions)
        lr = settings.of(DistillationOptions).distillation_lr
        model = moving_copy(source)
        start = copy.deepcopy(source.start).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(source.seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        space = output_map(options.output_space)
        weight = self.objective.weight(settings)
        count = options.anchors or len(inputs)
        for member in range(settings.members):
            loss = self.objective.next_loss(model, files, source, generator)
            for t in range(shares.steps_to(member)):
                for group in optimizer.param_groups:
                    group["lr"] = lr * shares.step_share(member, t)
                drawn = torch.randint(count, (options.anchor_batch,), generator=generator)
                anchors = source.augmented(inputs[drawn.to(inputs.device)])
                optimizer.zero_grad()
                with torch.no_grad():
                    reference = space(start(anchors))
                change = squared_distance(space(model(anchors)), reference).mean()
                (weight * loss() + change).backward()
                optimizer.step()
                give_back(t)
                source.progress(1, "distillation")
            yield Member(member_state(model, source, generator))
