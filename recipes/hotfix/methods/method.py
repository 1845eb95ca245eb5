"""The base of all methods: from the old network to networks that are right on the wrong inputs."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common.progress import Progress
from recipes.common.training import scores
from recipes.hotfix.case import Case
from recipes.hotfix.settings import HotfixSettings

RIGHT = 0.5  # the probability of the right class above which an input is right


@dataclass(frozen=True)
class Trial:
    """A network that a method made with one choice of its settings.

    Attributes:
        model: The network, in eval mode.
        steps: The steps that it took.
        seconds: The seconds that it took.
        choice: The settings by name.
        account: What else is to be told of the run.
    """

    model: nn.Module
    steps: int
    seconds: float
    choice: Mapping[str, float] = field(default_factory=dict)
    account: Mapping[str, Any] = field(default_factory=dict)


class Method(ABC):
    """A way to make a network right on a few inputs.

    A new method derives from this class and is registered in ``recipes.hotfix.methods``.

    Attributes:
        title: The name in tables.
        option_kinds: The dataclasses of the method's own options (``recipes.common.settings.option``).
    """

    title: ClassVar[str]
    option_kinds: ClassVar[tuple[type, ...]] = ()

    @abstractmethod
    def choices(self, settings: HotfixSettings) -> Sequence[Mapping[str, float]]:
        """The choices of its settings that are tried; the check inputs decide between them."""

    @abstractmethod
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
        """Changes the network in place until it is right on the wrong inputs, or the steps are used up.

        Args:
            model: A copy of the old network in eval mode, which it stays in.
            case: What the method is given.
            settings: The settings.
            choice: One of :meth:`choices`.
            seed: The seed of everything drawn.
            progress: Called after each step.

        Returns:
            The number of steps, and what else is to be told of the run.
        """

    def run(
        self, case: Case, settings: HotfixSettings, *, seed: int, progress: Progress
    ) -> list[Trial]:
        """Makes a network with each choice of the settings."""
        trials = []
        for choice in self.choices(settings):
            torch.manual_seed(seed)
            model = copy.deepcopy(case.old).requires_grad_(True)
            began = time.perf_counter()
            steps, account = self.fix(model, case, settings, choice, seed=seed, progress=progress)
            trials.append(Trial(model, steps, time.perf_counter() - began, choice, account))
        return trials


def edit_loss(model: nn.Module, case: Case) -> Tensor:
    """The cross-entropy of the wrong inputs."""
    return F.cross_entropy(model(case.wrong_inputs), case.wrong_labels)


def count_right(model: nn.Module, case: Case, least: float = RIGHT) -> int:
    """The number of wrong inputs whose right class has a probability above ``least``."""
    return int((scores(model, case.wrong_inputs, case.wrong_labels) > least).sum())


def take_steps(
    model: nn.Module,
    case: Case,
    step: Callable[[], object],
    *,
    most: int,
    progress: Progress,
    least: float = RIGHT,
) -> int:
    """Takes steps until all wrong inputs have a probability above ``least``, ``most`` at most; returns how many."""
    for taken in range(1, most + 1):
        step()
        right = count_right(model, case, least)
        progress(1, f"{right} of {len(case.wrong_inputs)} right")
        if right == len(case.wrong_inputs):
            return taken
    return most
