"""The base of all methods: from the dense network to one whose weights are on a grid."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fipoptim.secondary import OnGrid, QuantizedProjection
from recipes.common.batch_statistics import by_batch
from recipes.common.progress import Progress
from recipes.common.training import synchronize
from recipes.quantize.settings import QuantizeSettings
from recipes.quantize.statistics import with_carried_statistics


@dataclass(frozen=True)
class Case:
    """What a method is given.

    Attributes:
        dense: The dense network in eval mode; left as it is.
        images: Unlabelled training images ``(n, channels, h, w)``.
        bits: The bits of a weight.
        seed: The seed of everything drawn.
    """

    dense: nn.Module
    images: Tensor
    bits: int
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that are quantized: all weights of linear and convolution layers."""
        return QuantizedProjection(self.dense_copy(), self.bits).names

    def dense_copy(self) -> nn.Module:
        """A copy of the dense network whose parameters require gradients."""
        return copy.deepcopy(self.dense).requires_grad_(True)

    def by_batch(self) -> nn.Module:
        """Such a copy whose batch norm layers normalise by the statistics of the batch."""
        return by_batch(self.dense_copy())


@dataclass(frozen=True)
class Quantized:
    """A network that a method made.

    Attributes:
        model: The network in eval mode, with running statistics.
        grids: The integers and scales of its quantized parameters by name; its weights are theirs bit for bit.
        seconds: The seconds that it took.
    """

    model: nn.Module
    grids: Mapping[str, OnGrid]
    seconds: float


class Method(ABC):
    """A way to put the weights of a network on a grid.

    A new method derives from this class and is registered in ``recipes.quantize.methods``.

    Attributes:
        title: The name in tables and plots.
        option_kinds: The dataclasses of the method's own options (``recipes.common.settings.option``).
    """

    title: ClassVar[str]
    option_kinds: ClassVar[tuple[type, ...]] = ()

    def steps(self, settings: QuantizeSettings, case: Case) -> int:
        """The steps of :meth:`quantize`, for the progress bar."""
        return len(case.names)

    @abstractmethod
    def quantize(
        self, model: nn.Module, case: Case, settings: QuantizeSettings, progress: Progress
    ) -> dict[str, OnGrid]:
        """Finds integers and scales, and changes the other parameters in place.

        Args:
            model: A copy of the dense network that normalises by the statistics of each batch. What is left in its
                quantized parameters does not count.
            case: What the method is given.
            settings: The settings.
            progress: Called after each step.

        Returns:
            The integers and scales by the names of the dense network's parameters.
        """

    def run(self, case: Case, settings: QuantizeSettings, *, progress: Progress) -> Quantized:
        """Quantizes a copy of the dense network and measures its statistics."""
        torch.manual_seed(case.seed)
        model = case.by_batch()
        began = time.perf_counter()
        grids = self.quantize(model, case, settings, progress)
        with torch.no_grad():
            for name, grid in grids.items():
                model.get_parameter(name).copy_(grid.weights())
        batches = case.images.split(settings.chunk_size)
        shipped = with_carried_statistics(model, case.dense, batches)
        synchronize(case.images.device)
        return Quantized(shipped, grids, time.perf_counter() - began)
