"""The base of all methods: from the pretrained network to one that has learnt, in a given CPU time."""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recipes.common import processes
from recipes.finetune.case import Case, Examples, batches
from recipes.finetune.settings import FinetuneSettings

Choice = Mapping[str, float]  # values of a method's settings by name
WARM_UP = 0.1  # the share of a run in which the rate rises


class Training(ABC):
    """The training of one network.

    Attributes:
        share_of_steps: The share of the time that steps may take; the rest is for :meth:`finish`.
    """

    share_of_steps = 1.0

    @abstractmethod
    def step(self, batch: Examples, rate: float) -> None:
        """Takes one step.

        Args:
            batch: New examples.
            rate: The factor of the learning rate, by :func:`schedule`.
        """

    def finish(self) -> dict[str, Any]:
        """Does what is done at the end; returns what is to be told of the run."""
        return {}


class Method(ABC):
    """A way to fine-tune a network.

    A new method derives from this class and is registered in ``recipes.finetune.methods``.

    Attributes:
        title: The name in tables.
        option_kinds: The dataclasses of the method's own options (``recipes.common.settings.option``).
    """

    title: ClassVar[str]
    option_kinds: ClassVar[tuple[type, ...]] = ()

    @abstractmethod
    def choices(self, settings: FinetuneSettings) -> Sequence[Choice]:
        """The values of its settings; there is a run for each."""

    @abstractmethod
    def begin(
        self,
        model: nn.Module,
        case: Case,
        settings: FinetuneSettings,
        choice: Choice,
        *,
        seed: int,
    ) -> Training:
        """Prepares the training of a copy of the start.

        Args:
            model: The copy, which is trained in place.
            case: What the method is given.
            settings: The settings.
            choice: One of :meth:`choices`.
            seed: The seed of everything drawn.
        """

    def networks(
        self, run: Run, case: Case, settings: FinetuneSettings
    ) -> Sequence[tuple[Choice, nn.Module]]:
        """The networks that a finished run has made, with their settings."""
        return [(run.choice, run.model)]


class Run:
    """One run, step by step. Its clock is the CPU time of this process, and stands still between steps.

    Several processes take the same steps, by the clock of rank 0.

    Args:
        method: The method.
        case: What it is given.
        settings: The settings.
        choice: One of the method's choices.
        seed: The seed.

    Attributes:
        model: The network.
        steps: Steps taken.
        seconds: CPU seconds used.
        finished: Whether the run is at its end.
        account: What is to be told of it then.
    """

    def __init__(
        self, method: Method, case: Case, settings: FinetuneSettings, choice: Choice, *, seed: int
    ) -> None:
        self.method, self.choice = method, choice
        self.model = copy.deepcopy(case.start)
        self.steps, self.seconds, self.finished = 0, 0.0, False
        self.account: dict[str, Any] = {}
        self._settings = settings
        self._batches = batches(case.train, settings.batch_size, seed)
        torch.manual_seed(seed)
        began = time.process_time()
        self._training = method.begin(self.model, case, settings, choice, seed=seed)
        self._count_since(began)

    @property
    def share(self) -> float:
        """The share of the run's steps, or of the time for steps, that has been used."""
        if self._settings.steps is not None:
            return self.steps / self._settings.steps
        return self.seconds / (self._settings.seconds * self._training.share_of_steps)

    def advance(self) -> None:
        """Takes one step; or ends the run, if it has taken one and its steps or its time are used up."""
        share = self.share
        batch = next(self._batches) if share < 1 or self.steps == 0 else None
        began = time.process_time()
        if batch is not None:
            self._training.step(batch, schedule(min(share, 1.0)))
            self.steps += 1
        else:
            self.account = self._training.finish()
            self.finished = True
        self._count_since(began)

    def _count_since(self, began: float) -> None:
        self.seconds = processes.ranks().first(self.seconds + time.process_time() - began)


def schedule(share: float) -> float:
    """The factor of the rate: it rises linearly over the first tenth of a run, and falls to 0 as a cosine."""
    if share < WARM_UP:
        return (share + 0.1 * WARM_UP) / (1.1 * WARM_UP)
    return 0.5 + 0.5 * math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]
