"""AdamW on the loss of the new examples, alone or with a penalty; the base of the methods that do so."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from recipes.common import processes
from recipes.finetune.case import Case, Examples, shared_loss
from recipes.finetune.methods.method import Choice, Method, Training, trained
from recipes.finetune.settings import FinetuneSettings

Penalty = Callable[[int], Tensor]  # of the number of the step


class GradientMethod(Method):
    """AdamW on the loss and what :meth:`penalty` adds; ``choice["lr"]`` is its highest rate, with no decay."""

    @abstractmethod
    def penalty(
        self,
        model: nn.Module,
        case: Case,
        settings: FinetuneSettings,
        choice: Choice,
        *,
        seed: int,
    ) -> Penalty | None:
        """Makes the function that gives what is added to the loss of a step; None adds nothing.

        With several processes each adds its own, and the mean over them counts.
        """

    def begin(
        self,
        model: nn.Module,
        case: Case,
        settings: FinetuneSettings,
        choice: Choice,
        *,
        seed: int,
    ) -> Training:
        """See :class:`Method`."""
        penalty = self.penalty(model, case, settings, choice, seed=seed)
        return GradientTraining(model, penalty, choice["lr"])


class GradientTraining(Training):
    """The training of one network by AdamW.

    Args:
        model: The network.
        penalty: What is added to the loss.
        lr: The highest learning rate.
    """

    def __init__(self, model: nn.Module, penalty: Penalty | None, lr: float) -> None:
        self._model, self._penalty = processes.replicated(model), penalty
        self._lr, self._steps = lr, 0
        self._optimizer = torch.optim.AdamW(trained(model), lr=lr, weight_decay=0.0)

    def step(self, batch: Examples, rate: float) -> None:
        """See :class:`Training`."""
        self._optimizer.param_groups[0]["lr"] = rate * self._lr
        self._optimizer.zero_grad()
        total = shared_loss(self._model, batch)
        if self._penalty is not None:
            total = total + self._penalty(self._steps)
        total.backward()
        self._optimizer.step()
        self._steps += 1
