"""How a quantized network is measured: against the dense network, on test inputs that no method was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fipoptim.secondary import OnGrid
from recipes.common.data import Task
from recipes.common.training import outputs
from recipes.quantize.export import size_in_bytes

AT_ONCE = 500  # inputs evaluated at a time


class Measures:
    """Compares quantized networks with a dense one.

    Args:
        dense: The dense network.
        task: Its data.
    """

    def __init__(self, dense: nn.Module, task: Task) -> None:
        self._task = task
        self._before = outputs(dense, task.test_inputs, AT_ONCE)

    @property
    def dense_accuracy(self) -> float:
        """Percent of the test inputs that the dense network classifies correctly."""
        return self._share(self._before, self._task.test_labels)

    def of(self, model: nn.Module, grids: Mapping[str, OnGrid], bits: int) -> dict[str, Any]:
        """The figures of a quantized network.

        Args:
            model: The network; its weights are those of ``grids``.
            grids: Integers and scales by parameter name.
            bits: The bits of a weight.

        Returns:
            ``accuracy`` and ``agreement`` in percent of the test inputs; ``drift``, the mean squared distance of the
            outputs from the dense network's; ``bytes`` of the packed network and ``bits_a_weight``, its scales
            included.
        """
        now = outputs(model, self._task.test_inputs, AT_ONCE)
        weights = sum(grid.integers.numel() for grid in grids.values())
        scales = sum(grid.scales.numel() for grid in grids.values())
        return {
            "bits": bits,
            "accuracy": self._share(now, self._task.test_labels),
            "agreement": self._share(now, self._before.argmax(dim=1)),
            "drift": float((now - self._before).square().sum(dim=1).mean()),
            "bytes": size_in_bytes(model.state_dict(), grids, bits),
            "bits_a_weight": bits + 32 * scales / weights,
        }

    @staticmethod
    def _share(z: Tensor, classes: Tensor) -> float:
        return 100 * float((z.argmax(dim=1) == classes).double().mean())
