"""The base of all methods for learning one task after another: a record about the method, and its learner."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fipoptim.anchors.held_outputs import OutputRange
from fipoptim.anchors.measured import Measured
from recipes.common.augment import Augment
from recipes.continual.settings import ContinualSettings

Batches = Iterator[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


class Learner(ABC):
    """A network that learns tasks in turn by one method.

    Args:
        model: The network; trained in place.
        settings: The settings that all methods share.
        options: The options of this method, an instance of its :attr:`Method.options`.
        augment: Makes few remembered inputs many, if the method can use it; None leaves them as they are.
        seed: The seed of what is drawn from the remembered inputs.
        freeze_batch_norm: Whether batch norm layers keep their running statistics and normalise by them.
        loss: The loss of outputs and labels, for the new task and for remembered inputs with labels.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: ContinualSettings,
        options: Any,
        *,
        augment: Augment | None,
        seed: int,
        freeze_batch_norm: bool,
        loss: Loss = F.cross_entropy,
    ) -> None:
        self.model, self.settings, self.options = model, settings, options
        self.augment = augment
        self.generator = torch.Generator().manual_seed(seed)
        self.freeze_batch_norm = freeze_batch_norm
        self.loss = loss

    @abstractmethod
    def remember(self, inputs: Tensor, labels: Tensor, held: OutputRange | None = None) -> None:
        """Keeps what the method needs of the task just learnt.

        Args:
            inputs: A few of the task's inputs, ``(n, ...)``.
            labels: Their labels, ``(n,)``.
            held: The outputs that are held on these inputs, if the method holds outputs; None is all of them. Give it
                with every task or with none.
        """

    @abstractmethod
    def state(self) -> Any:
        """Everything that is remembered, as tensors and plain values for ``torch.save``."""

    @abstractmethod
    def load(self, state: Any) -> None:
        """Remembers what :meth:`state` returned."""

    @abstractmethod
    def remembered_bytes(self) -> int:
        """How many bytes are kept of the earlier tasks: inputs, outputs, labels, networks, importances."""

    def counted(self) -> Measured | None:
        """How far the function has moved where the method's budget counts; None without a budget."""
        return None

    @abstractmethod
    def learn(
        self,
        batches: Batches,
        *,
        steps: int,
        after_step: Callable[[int], None] | None = None,
        record: tuple[int, Path] | None = None,
    ) -> float:
        """Learns the next task.

        Args:
            batches: Inputs and labels of each step.
            steps: How many batches there are.
            after_step: Called with the number of steps taken; its time is not counted.
            record: For the invariant path only: the number of steps from one kept network to the next, and the folder
                that keeps them.

        Returns:
            Seconds spent, without those of ``after_step``.
        """


@dataclass(frozen=True)
class Needs:
    """A package that a method needs beside the dependencies of the recipes.

    Attributes:
        distribution: The name under which pip installs it.
        module: The module whose import shows that it is there.
    """

    distribution: str
    module: str

    def missing(self) -> bool:
        """Whether the module cannot be imported."""
        try:
            importlib.import_module(self.module)
        except ImportError:
            return True
        return False


def _no_fault(options: Any, settings: ContinualSettings) -> str | None:
    return None


@dataclass(frozen=True)
class Method:
    """A way to learn the next task. Its file makes one; ``recipes.continual.methods`` registers it.

    Attributes:
        name: What the command line and files call it.
        title: What tables and plots call it.
        learner: The class that learns.
        options: A dataclass whose fields are made by ``recipes.common.settings.option``, all with defaults. A recipe
            gives other defaults where it has tuned the method.
        needs: What must be installed beside the dependencies of the recipes; None if nothing.
        prefixed: Whether the options carry the method's name on the command line and stand under it in
            ``results.json``; those of the invariant path, which the recipes are about, do not.
        fault: Says what is wrong with options that do not go together, or with the shared settings: the name of an
            option, a colon and the reason. None if nothing is.
    """

    name: str
    title: str
    learner: type[Learner]
    options: type[Any]
    needs: Needs | None = None
    prefixed: bool = True
    fault: Callable[[Any, ContinualSettings], str | None] = _no_fault

    @property
    def prefix(self) -> str:
        """The part of an option on the command line between the two dashes and the option's name."""
        return f"{self.name}-" if self.prefixed else ""


def bytes_of(tensors: Any) -> int:
    """The bytes of all tensors in a nested structure of tuples, lists and dicts."""
    return sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, Tensor))
