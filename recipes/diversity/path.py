"""An ensemble on a functionally invariant path: far away first, then on from one member to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from recipes.common.process_memory import give_back
from recipes.diversity.settings import Way, phases, share, weight
from recipes.diversity.steps import Given, Member, arrived, moving, objective_of

AT_ONCE = 500  # anchors whose outputs are computed at a time, where they are many


def walk(way: Way, given: Given, files: Sequence[Path]) -> Iterator[Member]:
    """The members, one after the other; ``files`` grows as they are saved."""
    settings = given.settings
    generator = torch.Generator().manual_seed(given.seed)
    model = moving(given)
    anchors = _anchors(model, given, generator)
    straight = FIPOptimizer(  # L = 0: as straight as the function allows
        model.parameters(),
        anchors,
        eps=settings.straight_eps,
        solver=Solver(products=settings.straight_products),
        generator=generator,
    )
    # Towards the objective; without one, back to the function. First-order steps: over so many, with a new batch each,
    # products are not worth their time.
    turning = FIPOptimizer(
        model.parameters(),
        anchors,
        beta=weight(way, settings),
        eps=settings.eps,
        momentum=0.9,
        precondition="adam",
        solver=Solver(products=0),
        generator=generator,
    )
    walked = 0.0
    for member in range(settings.members):
        objective = objective_of(way, model, given, files, generator)
        for phase, steps in phases(way, settings, member):
            optimizer = straight if phase == "straight" else turning
            for t in range(steps):
                optimizer.zero_grad()
                if phase == "turn":
                    _turn(optimizer, objective, settings.eps * share(settings, member, t, steps))
                optimizer.step()
                assert optimizer.last_step is not None
                walked += optimizer.last_step.step_norm
                give_back(t)
                given.progress(1, f"drift {optimizer.last_step.drift:.3g}")
        yield Member(arrived(model, given, generator), walked)


def _anchors(model: torch.nn.Module, given: Given, generator: torch.Generator) -> AnchorBatch:
    settings, inputs = given.settings, given.task.train_inputs
    chosen = torch.randperm(len(inputs), generator=generator)[: settings.anchors or len(inputs)]
    return AnchorBatch(
        model,
        inputs[chosen.to(inputs.device)],
        output=settings.output_space,
        batch_size=min(settings.anchor_batch, len(chosen)),
        chunk_size=max(AT_ONCE, settings.anchor_batch),
        augment=given.augment,
        generator=generator,
    )


def _turn(optimizer: FIPOptimizer, objective: Callable[[], Tensor] | None, length: float) -> None:
    """The length and the gradient of a step; one of zero lets it restore the function alone."""
    for group in optimizer.param_groups:
        group["lr"] = length
    if objective is not None:
        objective().backward()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
