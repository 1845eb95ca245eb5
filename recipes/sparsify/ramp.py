"""The rise of the sparsity in gradual pruning."""

from __future__ import annotations

from dataclasses import dataclass

RISING = 0.5  # the share of the steps in which the sparsity rises; the weights that are left settle in the rest


@dataclass(frozen=True)
class Ramp:
    """A cubic course from one sparsity to the next (Zhu and Gupta, 2017).

    Attributes:
        begin: The sparsity before the first step.
        end: The sparsity from the end of the rise on.
        length: The number of steps in which it rises.
    """

    begin: float
    end: float
    length: int

    @classmethod
    def over(cls, begin: float, end: float, steps: int) -> Ramp:
        """A ramp for a training of that many steps."""
        return cls(begin, end, int(RISING * steps))

    def sparsity(self, step: int) -> float:
        """The sparsity at a step."""
        if step >= self.length:
            return self.end
        return self.end - (self.end - self.begin) * (1 - step / self.length) ** 3

    def rises_at(self, step: int, every: int) -> bool:
        """Whether the weights to keep are chosen anew at a step: at every ``every``-th, and at the end of the rise."""
        return step <= self.length and (step % every == 0 or step == self.length)
