"""Bounds and intervals, with a confidence, for a share of inputs and for a mean over inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fipoptim.optional import import_for

RESAMPLES = 1999  # of the bootstrap
_RESAMPLED_AT_ONCE = 2**22  # numbers


@dataclass(frozen=True)
class Share:
    """A share of the inputs, with an exact upper bound on the share in the distribution that they are drawn from.

    Attributes:
        count: The number of inputs with the property.
        inputs: The number of inputs.
        bound: The one-sided bound of Clopper and Pearson (1934): with the certificate's confidence, the share in the
            distribution is at most this.
    """

    count: int
    inputs: int
    bound: float

    @property
    def rate(self) -> float:
        """The share among the inputs."""
        return self.count / self.inputs


@dataclass(frozen=True)
class MeanDrift:
    r"""The mean over the inputs of :math:`\|z - z_{ref}\|^2`.

    A mean of numbers without a largest value has no exact bound. These are those of the bias-corrected and accelerated
    bootstrap (Efron, 1987), which are right for many inputs.

    Attributes:
        rate: The mean.
        low: The lower end of the two-sided interval.
        high: The upper end of the two-sided interval.
        bound: The one-sided upper bound.
    """

    rate: float
    low: float
    high: float
    bound: float


def inputs_needed(max_share: float, confidence: float = 0.95) -> int:
    """The least number of inputs that certify ``max_share``, if not a single one of them is changed.

    Raises:
        ValueError: If ``max_share`` or ``confidence`` is not in (0, 1).
    """
    for name, value in (("max_share", max_share), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: must be in (0, 1), got {value!r}.")
    return math.ceil(math.log1p(-confidence) / math.log1p(-max_share))


def corrected(confidence: float, number: int) -> float:
    """The confidence of each of ``number`` bounds that are to hold together (Bonferroni)."""
    return 1 - (1 - confidence) / max(1, number)


def share_of(hits: Tensor, confidence: float) -> Share:
    """The share of true entries, with the one-sided bound of Clopper and Pearson."""
    stats = import_for("bound a share", "scipy.stats")
    count, number = int(hits.sum()), len(hits)
    interval = stats.binomtest(count, number, alternative="less").proportion_ci(confidence, "exact")
    return Share(count, number, float(interval.high))


def mean_of(drifts: Tensor, confidence: float) -> MeanDrift:
    """The mean of ``drifts`` ``(N,)``, with the interval and the bound of the bootstrap.

    Nothing is known of the spread of a single drift, so its interval has no upper end. Drifts that are all equal have
    the interval of that number alone.
    """
    stats = import_for("bound a mean", "scipy.stats")
    values = drifts.double().cpu().numpy()
    mean = float(values.mean())
    if len(values) < 2:
        return MeanDrift(mean, 0.0, math.inf, math.inf)
    if (values == values[0]).all():
        return MeanDrift(mean, mean, mean, mean)

    def interval(alternative: str) -> Any:
        return stats.bootstrap(
            (values,),
            lambda x, axis: x.mean(axis=axis),
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, _RESAMPLED_AT_ONCE // len(values)),
            confidence_level=confidence,
            alternative=alternative,
            method="BCa",
            rng=0,
        ).confidence_interval

    two_sided = interval("two-sided")
    return MeanDrift(
        mean, float(two_sided.low), float(two_sided.high), float(interval("less").high)
    )
