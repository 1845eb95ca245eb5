"""What paths and distillation share: what they start from, what they minimise, and what a member is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fipoptim.secondary import Diversity
from recipes.common.augment import Augment
from recipes.common.batch_statistics import by_batch, with_statistics
from recipes.common.data import DATASETS, Task
from recipes.common.progress import Progress
from recipes.diversity.settings import Settings, Way
from recipes.diversity.withstand import Withstand

MEASURED = 100  # batches of an objective's size that a member's running statistics are measured on


@dataclass(frozen=True)
class Given:
    """What an ensemble is made from.

    Attributes:
        start: The trained network; left as it is.
        task: What it was trained on.
        settings: How.
        augment: What training sees of its inputs; what holds the function, and objectives, see the same.
        seed: Of everything drawn.
        progress: Called with the number of steps just taken and what is going on.
    """

    start: nn.Module
    task: Task
    settings: Settings
    augment: Augment | None
    seed: int
    progress: Progress

    def seen(self, inputs: Tensor) -> Tensor:
        """Inputs as training sees them."""
        return inputs if self.augment is None else self.augment(inputs)


@dataclass(frozen=True)
class Member:
    """A network of an ensemble.

    Attributes:
        state: Its ``state_dict``.
        length: On a path, the Euclidean length walked to it from the start network.
    """

    state: dict[str, Tensor]
    length: float | None = None


def objective_of(
    way: Way, model: nn.Module, given: Given, files: Sequence[Path], generator: torch.Generator
) -> Callable[[], Tensor] | None:
    """What the next member is to be: unlike the start network and some of the earlier members, in ``files``."""
    if way.objective is None:
        return None
    settings, start = given.settings, given.start
    drawn = torch.randperm(len(files), generator=generator)[: settings.others]
    others = []
    for k in drawn.tolist():
        others.append(copy.deepcopy(start))
        others[-1].load_state_dict(load_file(files[k]))
    batches = _Batches(given, generator, noise=settings.noise if way.objective == "misalign" else 0)
    if way.objective == "misalign":
        return Diversity(model, [start, *others], batches)
    return Withstand(
        model,
        start,
        others,
        batches,
        info=DATASETS[given.task.name],
        eps=settings.withstand_eps,
        generator=generator,
        autocast=settings.autocast,
    )


def moving(given: Given) -> nn.Module:
    """The copy of the start network that moves."""
    if given.settings.batch_statistics:
        return by_batch(given.start)
    return copy.deepcopy(given.start).eval()


def arrived(model: nn.Module, given: Given, generator: torch.Generator) -> dict[str, Tensor]:
    """The member that the network which moves is by now."""
    if not given.settings.batch_statistics:
        return copy.deepcopy(model.state_dict())
    some = (x for x, _ in islice(_Batches(given, generator), MEASURED))
    return with_statistics(model, given.start, some).state_dict()


class _Batches:
    """Training inputs, with some noise if asked for, and their labels, drawn anew for each pass."""

    def __init__(self, given: Given, generator: torch.Generator, *, noise: float = 0.0) -> None:
        self.given, self.generator, self.noise = given, generator, noise
        self.std = torch.tensor(DATASETS[given.task.name].std).view(-1, 1, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        task = self.given.task
        inputs = task.train_inputs
        order = torch.randperm(len(inputs), generator=self.generator)
        for part in order.split(self.given.settings.objective_batch):
            chosen = part.to(inputs.device)
            x = self.given.seen(inputs[chosen])
            if self.noise > 0:
                drawn = 2 * torch.rand(x.shape, generator=self.generator).to(x) - 1
                x = x + self.noise / self.std.to(x) * drawn
            yield x, task.train_labels[chosen]
