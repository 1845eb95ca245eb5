"""The base of all methods: from the old network to networks that know all classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from recipes.common.progress import Progress
from recipes.common.training import steps_in_epochs
from recipes.update.case import Case
from recipes.update.settings import UpdateSettings


@dataclass(frozen=True)
class Update:
    """A network that a method made.

    Attributes:
        name: What tells it from the method's other networks; empty if there is one alone.
        model: The network, in eval mode.
        inputs: The labelled inputs that its steps have seen, counted anew in each pass.
        seconds: The seconds that it took from the old network.
        budget: The budget that it was to keep; None if it had none.
        account: What else is to be told of it.
    """

    name: str
    model: nn.Module
    inputs: int
    seconds: float
    budget: float | None = None
    account: Mapping[str, Any] = field(default_factory=dict)


class Method(ABC):
    """A way to teach a network more classes.

    A new method derives from this class and is registered in ``recipes.update.methods``.

    Attributes:
        title: The name in tables and figures.
        option_kinds: The dataclasses of the method's own options (``recipes.common.settings.option``).
    """

    title: ClassVar[str]
    option_kinds: ClassVar[tuple[type, ...]] = ()

    @abstractmethod
    def names(self, settings: UpdateSettings) -> Sequence[str]:
        """The names of the networks that :meth:`run` makes, in its order."""

    @abstractmethod
    def epochs(self, settings: UpdateSettings) -> float:
        """The passes over the labelled inputs."""

    @abstractmethod
    def run(
        self, case: Case, settings: UpdateSettings, *, seed: int, progress: Progress
    ) -> list[Update]:
        """Makes the networks.

        Args:
            case: What the method is given.
            settings: The settings.
            seed: The seed of everything drawn.
            progress: Called after each step.
        """

    def steps(self, case: Case, settings: UpdateSettings) -> int:
        """The number of training steps."""
        return steps_in_epochs(case.task, settings.batch_size, self.epochs(settings))


def percent(share: float) -> str:
    """A share as the name of a network has it."""
    return f"{100 * share:g} %"
