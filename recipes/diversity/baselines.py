"""Ensembles as others make them: trained apart, on a cyclic learning rate, by distillation, by noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fipoptim.anchors import squared_distance
from fipoptim.output_space import output_map
from recipes.common.augment import Augment
from recipes.common.data import Task
from recipes.common.process_memory import give_back
from recipes.common.progress import Progress
from recipes.common.training import (
    adam_one_cycle,
    minibatches,
    seed_everything,
    steps_an_epoch,
    train,
)
from recipes.diversity.settings import Settings, Way, cycle, phases, share, weight
from recipes.diversity.steps import Given, Member, arrived, moving, objective_of

Build = Callable[[], nn.Module]


def train_network(
    build: Build,
    task: Task,
    settings: Settings,
    *,
    augment: Augment | None,
    seed: int,
    progress: Progress = lambda steps, text: None,
) -> nn.Module:
    """A network trained from scratch by Adam on one cycle, in eval mode; in channels-last layout, as its copies are."""
    seed_everything(seed)
    model = build().to(task.train_inputs.device).to(memory_format=torch.channels_last)
    steps = settings.epochs * steps_an_epoch(task, settings.batch_size)
    batches = minibatches(task, batch_size=settings.batch_size, epochs=settings.epochs, seed=seed)
    train(
        model,
        ((augment(x), y) for x, y in batches) if augment else batches,
        *adam_one_cycle(model, lr=settings.lr, steps=steps),
        autocast=settings.autocast,
        after_step=lambda step: progress(1, "training"),
    )
    return model.eval()


def independent(build: Build, given: Given, first: int) -> Iterator[Member]:
    """Members from the ``first`` on, each trained from scratch with a seed of its own."""
    for k in range(first, given.settings.members):
        model = train_network(
            build,
            given.task,
            given.settings,
            augment=given.augment,
            seed=1000 * (given.seed + 1) + k,  # far from those of the start networks
            progress=given.progress,
        )
        yield Member(model.state_dict())


def geometric(given: Given) -> Iterator[Member]:
    """Fast geometric ensembling (Garipov et al., 2018): SGD, a network each time its learning rate is lowest."""
    settings = given.settings
    model = copy.deepcopy(given.start)
    steps = cycle(given.task, settings)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.cycle_lr, momentum=0.9, weight_decay=5e-4
    )

    def of_highest(step: int) -> float:
        at = (step % steps) / steps  # from the lowest rate up to the highest and down again
        return 0.01 + 0.99 * (1 - abs(2 * at - 1))

    scheduler = LambdaLR(optimizer, of_highest)
    epochs = math.ceil(settings.members * settings.cycle_epochs) + 1
    batches = minibatches(
        given.task, batch_size=settings.batch_size, epochs=epochs, seed=given.seed
    )
    for _ in range(settings.members):
        train(
            model,
            ((given.seen(x), y) for x, y in islice(batches, steps)),
            optimizer,
            scheduler,
            autocast=settings.autocast,
            after_step=lambda step: given.progress(1, "cycle"),
        )
        yield Member(copy.deepcopy(model.state_dict()))


def distilled(way: Way, given: Given, files: Sequence[Path]) -> Iterator[Member]:
    """Adam on what the path of the same objective minimises, in as many steps; ``files`` grows as members are saved."""
    settings, inputs = given.settings, given.task.train_inputs
    model = moving(given)
    reference = copy.deepcopy(given.start).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(given.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.distillation_lr)
    space = output_map(settings.output_space)
    held = settings.anchors or len(inputs)
    for member in range(settings.members):
        objective = objective_of(way, model, given, files, generator)
        assert objective is not None
        ((_, steps),) = phases(way, settings, member)
        for t in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.distillation_lr * share(settings, member, t, steps)
            chosen = torch.randint(held, (settings.anchor_batch,), generator=generator)
            seen = given.seen(inputs[chosen.to(inputs.device)])
            optimizer.zero_grad()
            with torch.no_grad():
                kept = space(reference(seen))
            change = squared_distance(space(model(seen)), kept).mean()
            (weight(way, settings) * objective() + change).backward()
            optimizer.step()
            give_back(t)
            given.progress(1, "distillation")
        yield Member(arrived(model, given, generator))


def noise(given: Given, distances: Sequence[float]) -> Iterator[Member]:
    """The start network moved in random directions, as far as told."""
    generator = torch.Generator().manual_seed(given.seed)
    for distance in distances:
        model = copy.deepcopy(given.start)
        parameters = list(model.parameters())
        drawn = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        size = math.sqrt(sum(float(d.square().sum()) for d in drawn))
        with torch.no_grad():
            for p, d in zip(parameters, drawn, strict=True):
                p.add_(d, alpha=distance / size)
        yield Member(model.state_dict())
