"""The base of all networks: how one comes about, what its anchors are, and what it has not learnt yet."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from recipes.common.progress import Progress
from recipes.spectrum.settings import SpectrumSettings
from recipes.spectrum.start import NewTask


@dataclass(frozen=True)
class Given:
    """What the command line says of data and files.

    Attributes:
        data_root: The folder of torchvision's data sets.
        download: Whether data that is not there may be fetched.
        checkpoint: The file of a trained network; None if none was given.
        texts: The folder of texts.
        device: The device of the runs.
    """

    data_root: Path
    download: bool
    checkpoint: Path | None
    texts: Path
    device: torch.device


class Network(ABC):
    """A network whose metric is looked at, before and after training.

    A new one derives from this class and is registered in ``recipes.spectrum.networks``.

    Args:
        given: What the command line says.
        settings: The settings.

    Attributes:
        settings: The default settings.
        needs_checkpoint: Whether the trained network comes from a file; otherwise it is trained here.
        before: What the network is called before training.
        after: What it is called after training.
        at_first: Whether the new task finds the network as it is before training.
        output: The output space of the anchors.
        chunk_size: Anchors that are evaluated at a time; None is all.
        trace: Whether the derivative is traced, which pays if a trace takes less time than some hundred products.

    Raises:
        DataError: If data or a file cannot be used.
    """

    settings: ClassVar[SpectrumSettings]
    needs_checkpoint: ClassVar[bool] = False
    before: ClassVar[str] = "random"
    after: ClassVar[str] = "trained"
    at_first: ClassVar[bool] = False
    output: Any = "logits"
    chunk_size: ClassVar[int | None] = None
    trace: ClassVar[bool] = True

    @abstractmethod
    def __init__(self, given: Given, settings: SpectrumSettings) -> None: ...

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """What results depend on beside the settings, as JSON has it."""

    @abstractmethod
    def build(self, seed: int) -> nn.Module:
        """The network before training, in eval mode; the same at every call."""

    @property
    @abstractmethod
    def training_steps(self) -> int:
        """Steps of :meth:`train`."""

    @abstractmethod
    def train(self, model: nn.Module, seed: int, progress: Progress) -> None:
        """Trains the network in place; it is left in eval mode."""

    @abstractmethod
    def anchors(self, seed: int) -> Any:
        """The inputs over which the metric is the mean, drawn from training data."""

    @abstractmethod
    def new_task(self, model: nn.Module, seed: int) -> NewTask:
        """A task that the network has not learnt.

        Args:
            model: The network that the task finds, left as it is.
            seed: The seed of the draws.
        """

    def named(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of which the metric is taken, by name."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def trained(self, before: nn.Module, seed: int, progress: Progress) -> nn.Module:
        """A copy of the network, trained."""
        model = copy.deepcopy(before)
        self.train(model, seed, progress)
        return model.eval()
