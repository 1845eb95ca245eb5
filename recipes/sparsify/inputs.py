"""The training inputs that a method prunes with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from recipes.common.augment import Augment
from recipes.common.data import Task
from recipes.sparsify.settings import SparsifySettings


class PruningInputs:
    """Training inputs and their labels, in shuffled batches.

    Args:
        task: The data set; ``settings.anchors`` of its training inputs are drawn.
        settings: The settings.
        augment: Changes the inputs of each step; None leaves them as they are.
        mirror: Whether the mirror image of each input is added.
        generator: The generator of every draw.

    Attributes:
        images: The inputs ``(n, channels, h, w)``.
        labels: Their labels ``(n,)``.
    """

    def __init__(
        self,
        task: Task,
        settings: SparsifySettings,
        *,
        augment: Augment | None,
        mirror: bool,
        generator: torch.Generator,
    ) -> None:
        self.augment, self.generator = augment, generator
        self.batch_size = settings.batch_size
        count = len(task.train_inputs)
        drawn = torch.randperm(count, generator=generator)[: settings.anchors or count]
        drawn = drawn.to(task.train_inputs.device)
        self.images, self.labels = task.train_inputs[drawn], task.train_labels[drawn]
        if mirror:
            self.images = torch.cat([self.images, self.images.flip(3)])
            self.labels = torch.cat([self.labels, self.labels])

    def batches(self) -> Iterator[Tensor]:
        """Indices of the inputs of each step, without end; no batch is larger than the number of inputs."""
        count = len(self.images)
        size = min(self.batch_size, count)
        while True:
            order = torch.randperm(count, generator=self.generator).to(self.images.device)
            for k in range(count // size):
                yield order[k * size : (k + 1) * size]

    def augmented(self, batch: Tensor) -> Tensor:
        """The inputs with these indices, as a step sees them."""
        images = self.images[batch]
        return images if self.augment is None else self.augment(images)
