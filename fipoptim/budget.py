"""Budgets: how far the function of a network may move from its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fipoptim.anchors.measured import Measured
from fipoptim.checks import check_number

ADVICE = (
    "Did something else change the network (batch norm statistics in train mode, another optimizer)? "
    "Put batch norm in eval mode, raise the budget, or refresh() the anchors."
)


@dataclass(frozen=True)
class Budget:
    """Bounds on the distance from the reference.

    Attributes:
        max_drift: The largest drift; None bounds nothing.
        max_flips: The largest share of inputs whose prediction is not that of the reference; None bounds nothing.
    """

    max_drift: float | None = None
    max_flips: float | None = None

    @classmethod
    def checked(cls, max_drift: Any, max_flips: Any) -> Budget:
        """The budget of these bounds.

        Raises:
            TypeError: If a bound is no number.
            ValueError: If ``max_drift`` is negative or not finite, or ``max_flips`` is not in [0, 1).
        """
        return cls(
            None if max_drift is None else check_number("max_drift", max_drift),
            None if max_flips is None else check_number("max_flips", max_flips, below=1.0),
        )

    @property
    def given(self) -> bool:
        """Whether there is a bound at all."""
        return self.max_drift is not None or self.max_flips is not None

    def holds(self, found: Measured) -> bool:
        """Whether a network is within every bound."""
        return not (
            (self.max_drift is not None and not found.drift <= self.max_drift)
            or (self.max_flips is not None and not found.flips <= self.max_flips)
        )

    def tightened(self, factor: float) -> Budget:
        """The budget with its bound on the drift multiplied by ``factor``; flips come in whole inputs and stay."""
        return Budget(None if self.max_drift is None else factor * self.max_drift, self.max_flips)

    def broken(self, found: Measured) -> str:
        """What is not within, for a message: each bound that does not hold with what was found."""
        parts = []
        if self.max_drift is not None and not found.drift <= self.max_drift:
            parts.append(f"max_drift: the drift is {found.drift:.6g}, beyond {self.max_drift:.6g}")
        if self.max_flips is not None and not found.flips <= self.max_flips:
            parts.append(
                f"max_flips: {found.flips:.4%} of the predictions differ, beyond {self.max_flips:.4%}"
            )
        return "; ".join(parts)
