"""Notices that the weights of a model have changed since products with its metric were prepared."""

from __future__ import annotations

from torch import Tensor, nn

from fipoptim.metric.compare import same_values
from fipoptim.shards import local, named_parameters


class WeightGuard:
    """Remembers the parameters of a model.

    Args:
        model: The model.
        copies: Keep a copy of the parameters, to notice every change. Without it, a change that torch does not count,
            such as one through ``.data``, goes unnoticed.
    """

    def __init__(self, model: nn.Module, *, copies: bool) -> None:
        self._model = model
        now = self._now()
        self._versions = [p._version for p in now]
        self._copies = [p.detach().clone() for p in now] if copies else None

    def check(self) -> None:
        """Refuse to go on with other weights.

        Raises:
            RuntimeError: If the parameters have changed.
        """
        if self._versions != [p._version for p in self._now()] or not self._same():
            raise RuntimeError(
                "AnchorMetric: the weights have changed since this metric was built; build a new one."
            )

    def _now(self) -> list[Tensor]:
        """The parameters of now; of those that are divided among ranks, the part of this rank."""
        return [local(p) for p in named_parameters(self._model).values()]

    def _same(self) -> bool:
        """Whether the parameters have the values of the copies."""
        if self._copies is None:
            return True
        now = [p.detach() for p in self._now()]
        return len(now) == len(self._copies) and all(
            p.shape == copy.shape
            and p.dtype == copy.dtype
            and p.device == copy.device
            and same_values(p, copy)
            for p, copy in zip(now, self._copies, strict=True)
        )
