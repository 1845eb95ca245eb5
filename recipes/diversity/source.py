"""The start network and everything else that an ensemble is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from recipes.common.augment import Augment
from recipes.common.data import Task
from recipes.common.progress import Progress
from recipes.diversity.settings import EnsembleSettings

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class EnsembleSource:
    """Everything that an ensemble is made from.

    Attributes:
        start: The trained network; left as it is.
        build: Makes its architecture, newly initialised.
        task: The data that it was trained on.
        settings: The settings.
        augment: Changes inputs as in training; anchors and objectives see their inputs changed alike. None leaves them
            as they are.
        distances: For weight noise, the Euclidean distance of each member from the start network.
        seed: The seed of everything drawn.
        progress: Called with the number of steps just taken and a text.
    """

    start: nn.Module
    build: Build
    task: Task
    settings: EnsembleSettings
    augment: Augment | None
    distances: Sequence[float]
    seed: int
    progress: Progress

    def augmented(self, inputs: Tensor) -> Tensor:
        """The inputs as training sees them."""
        return inputs if self.augment is None else self.augment(inputs)


@dataclass(frozen=True)
class Member:
    """A network of an ensemble.

    Attributes:
        state: Its ``state_dict``.
        length: The Euclidean length of the path from the start network to it; None if the method walks no path.
    """

    state: dict[str, Tensor]
    length: float | None = None
