"""The outcome of a pruning method: a sparse network for each sparsity asked for, and the path to them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SparseNetwork:
    """One sparse network.

    Attributes:
        sparsity: The share of zeros that was asked for.
        zeros: The number of prunable weights that are exactly zero.
        total: The number of prunable weights.
        per_layer: The share of zeros in each layer.
        accuracy: Percent of the test inputs that are classified correctly.
        agreement: Percent of the test inputs whose predicted class is that of the dense network.
        seconds: Time spent from the dense network to this one; tests are not counted.
        state: The weights and buffers, which load into the plain model.
    """

    sparsity: float
    zeros: int
    total: int
    per_layer: dict[str, float]
    accuracy: float
    agreement: float
    seconds: float
    state: dict[str, Tensor] = field(repr=False)

    def metrics(self) -> dict[str, object]:
        """The numbers of ``results.json``."""
        return {
            "sparsity": self.zeros / self.total,
            "nonzero": self.total - self.zeros,
            "total": self.total,
            "accuracy": self.accuracy,
            "agreement": self.agreement,
            "per_layer_sparsity": self.per_layer,
            "seconds": self.seconds,
        }


@dataclass
class Outcome:
    """The outcome of one run of a method.

    Attributes:
        networks: The sparse networks, one for each sparsity asked for.
        path: The prunable weights on the path, as flat vectors; the first is the dense network's. Empty if the method
            keeps no path.
        positions: For each of ``networks`` its index in ``path``.
    """

    networks: list[SparseNetwork]
    path: list[Tensor]
    positions: list[int]
