"""The base of all objectives, and the options that they share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.common.data import DATASETS
from recipes.common.options import COUNT, RATE, whole
from recipes.common.settings import option
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.source import EnsembleSource

Loss = Callable[
    [], Tensor
]  # the loss on the next batch, a scalar with a graph to the model's parameters


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The options of all methods that minimise an objective, in paths and in distillation alike."""

    group: ClassVar[str] = "objectives"

    away: int = option("steps on an objective to the first member", default=1000, **COUNT)
    between: int = option("steps on an objective from one member to the next", default=120, **COUNT)
    between_share: float = option(
        "step length, or learning rate, of these as a share of the one before", default=1.0, **RATE
    )
    objective_batch: int = option("inputs of an objective in each step", default=64, **COUNT)
    others: int = option(
        "largest number of earlier members to differ from", default=2, type=whole(0), metavar="N"
    )

    def steps_to(self, member: int) -> int:
        """The number of steps to the member of that index, from the member before."""
        return self.away if member == 0 else self.between

    def step_share(self, member: int, step: int) -> float:
        """The share of the full step length, or learning rate, at a step on the way to a member.

        It falls to nothing before the member, so that the member settles.
        """
        most = 1.0 if member == 0 else self.between_share
        return most * min(1.0, 2 * (1 - step / self.steps_to(member)))


class Objective(ABC):
    """An objective that members minimise beside keeping the function.

    Attributes:
        option_kinds: The dataclasses of the objective's own options.
    """

    option_kinds: ClassVar[tuple[type, ...]] = ()

    @abstractmethod
    def weight(self, settings: EnsembleSettings) -> float:
        """The weight of the objective against the squared output change."""

    @abstractmethod
    def loss(
        self,
        model: nn.Module,
        others: Sequence[nn.Module],
        source: EnsembleSource,
        generator: torch.Generator,
    ) -> Loss:
        """The loss that moves ``model`` away from the start network and from ``others``.

        Args:
            model: The network that is optimized.
            others: Earlier members.
            source: The start network and everything else that the ensemble is made from.
            generator: The generator of everything drawn.
        """

    def next_loss(
        self,
        model: nn.Module,
        files: Sequence[Path],
        source: EnsembleSource,
        generator: torch.Generator,
    ) -> Loss:
        """The loss on the way to the next member: some of the earlier ones, saved in ``files``, are drawn."""
        options = source.settings.of(ObjectiveOptions)
        drawn = torch.randperm(len(files), generator=generator)[: options.others]
        others = []
        for k in drawn.tolist():
            others.append(copy.deepcopy(source.start))
            others[-1].load_state_dict(load_file(files[k]))
        return self.loss(model, others, source, generator)


class ObjectiveBatches:
    """Training inputs and labels in batches of ``objective_batch``; each pass draws a new order.

    Args:
        source: The start network and everything else that the ensemble is made from.
        generator: The generator of the order and of the noise.
        noise: The largest change of a pixel by uniform noise, in units of the pixels' range.
    """

    def __init__(
        self, source: EnsembleSource, generator: torch.Generator, *, noise: float = 0.0
    ) -> None:
        self.source, self.generator, self.noise = source, generator, noise
        self.size = source.settings.of(ObjectiveOptions).objective_batch
        self.std = torch.tensor(DATASETS[source.task.name].std).view(-1, 1, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        task = self.source.task
        inputs = task.train_inputs
        order = torch.randperm(len(inputs), generator=self.generator)
        for part in order.split(self.size):
            indices = part.to(inputs.device)
            x = self.source.augmented(inputs[indices])
            if self.noise > 0:
                uniform = 2 * torch.rand(x.shape, generator=self.generator).to(x) - 1
                x = x + self.noise / self.std.to(x) * uniform
            yield x, task.train_labels[indices]
