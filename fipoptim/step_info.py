"""The account of one step. What only a further forward pass can tell is measured when someone reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.output_space import squared_distance
from fipoptim.anchors.sample import Sample
from fipoptim.mean import AnchorMean
from fipoptim.shards import local, named_parameters


class Effect(NamedTuple):
    """What a step did to the outputs of its anchors; see :class:`StepInfo`."""

    multiplier: float
    output_change: float
    drift: float


class StepInfo:
    r"""The account of one step.

    A step without products and without a budget does not evaluate the network that it leads to. Its ``multiplier``,
    ``output_change`` and ``drift`` are then measured when the first of them is read, by a forward pass over the step's
    anchors. Read them before the next step, or not at all. With several ranks, call :meth:`measure` on all of them
    before one reads a figure.

    Attributes:
        loss: The secondary loss before the step; None if only ``.grad`` was given, or if L = 0.
        step_norm: The Euclidean length of the step taken.
        multiplier: The multiplier :math:`\mu` of Eq. 4.
        output_change_predicted: The change of the outputs to first order, :math:`\sqrt{v^\top g v}`: RMS over this
            step's anchors of :math:`\|\Delta z\|`. None if the step used no products.
        output_change: The change of the outputs as measured: RMS over this step's anchors of :math:`\|\Delta z\|`.
        drift: The mean of :math:`\|z - z_{ref}\|^2` after the step: over the inputs on which the budget counts if this
            step was held to one, else over this step's anchors.
        flips: The share of the inputs on which the budget counts whose prediction is not that of the reference; None if
            this step was not held to a budget.
        iterations: The number of metric products taken.
        residual: The relative KKT residual of Eq. 4. None if the step took no product, or took all products it was
            allowed: the residual would then cost half a product more.
        backtracks: How many trials were given up, or restoring steps taken, to hold the budget.

    Raises:
        RuntimeError: If one of the three is read first when the weights have moved on.
    """

    loss: float | None
    step_norm: float
    output_change_predicted: float | None
    flips: float | None
    iterations: int
    residual: float | None
    backtracks: int

    def __init__(
        self,
        *,
        loss: float | None,
        step_norm: float,
        effect: Effect | Callable[[], Effect],
        output_change_predicted: float | None,
        flips: float | None,
        iterations: int,
        residual: float | None,
        backtracks: int,
    ) -> None:
        self.loss = loss
        self.step_norm = step_norm
        self.output_change_predicted = output_change_predicted
        self.flips = flips
        self.iterations = iterations
        self.residual = residual
        self.backtracks = backtracks
        self._effect = effect

    def measure(self) -> Effect:
        """Measure the three figures that may still have to be measured. With several ranks all of them call it.

        Raises:
            RuntimeError: If they were not measured before the weights moved on.
        """
        if callable(self._effect):
            self._effect = self._effect()
        return self._effect

    @property
    def effect(self) -> Effect:
        """The three figures.

        Raises:
            RuntimeError: If they were not measured before the weights moved on, or if several ranks have to measure
                them: whoever reads a figure on one of them alone would wait for the others.
        """
        if isinstance(self._effect, Measurement) and not self._effect.alone:
            raise RuntimeError(
                "last_step: what this step did to the outputs has not been measured, and all ranks have to. Call "
                "last_step.measure() on every rank first."
            )
        return self.measure()

    @property
    def multiplier(self) -> float:
        r"""The multiplier :math:`\mu` of Eq. 4."""
        return self.effect.multiplier

    @property
    def output_change(self) -> float:
        r"""The change of the outputs as measured: RMS over this step's anchors of :math:`\|\Delta z\|`."""
        return self.effect.output_change

    @property
    def drift(self) -> float:
        r"""The mean of :math:`\|z - z_{ref}\|^2` after the step."""
        return self.effect.drift

    def _figures(self) -> dict[str, Any]:
        try:
            effect: dict[str, Any] = self.effect._asdict()
        except RuntimeError:
            effect = dict.fromkeys(Effect._fields, "not measured")
        return {k: v for k, v in vars(self).items() if k != "_effect"} | effect

    def __eq__(self, other: object) -> bool:
        """Whether all figures are the same."""
        if not isinstance(other, StepInfo):
            return NotImplemented
        return self is other or self._figures() == other._figures()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """All figures, measured now if they still can be."""
        return f"StepInfo({', '.join(f'{name}={x}' for name, x in self._figures().items())})"

    def __getstate__(self) -> dict[str, Any]:
        """The content of a copy or pickle: figures, measured now if they still can be."""
        try:
            effect: Effect | Callable[[], Effect] = self.effect
        except RuntimeError:
            effect = _moved_on
        return vars(self) | {"_effect": effect}


def _moved_on() -> Effect:
    raise RuntimeError(
        "last_step: the weights have moved since this step, and what it did to the outputs was not measured. Read "
        "last_step.drift, .output_change or .multiplier before the next step; a step without products and without a "
        "budget measures them only then."
    )


class Measurement:
    r"""Measures the effect of a step without products as long as its network is there.

    Args:
        anchors: The anchors.
        sample: The anchors of the step.
        before: Their outputs before the step, shape ``(N, m)``.
        mean: The mean over these anchors.
        gain: The gain :math:`-c^\top v` of the step.
        length: The length :math:`\varepsilon` of the sphere.
    """

    def __init__(
        self,
        anchors: AnchorBatch,
        sample: Sample,
        before: Tensor,
        mean: AnchorMean,
        gain: float,
        length: float,
    ) -> None:
        self._anchors, self._sample, self._before, self._mean = anchors, sample, before, mean
        self._gain, self._length = gain, length
        self._versions = self._versions_of_now()

    @property
    def alone(self) -> bool:
        """Whether one process measures."""
        return self._anchors.ranks.alone

    def _versions_of_now(self) -> list[tuple[int, int]]:
        return [(id(p), local(p)._version) for p in named_parameters(self._anchors.model).values()]

    def __call__(self) -> Effect:
        """Evaluate the network of now.

        Raises:
            RuntimeError: If its weights have moved.
        """
        if self._versions_of_now() != self._versions:
            _moved_on()
        outputs = self._anchors.outputs(self._sample.inputs)
        effect = effect_of(math.nan, self._before, outputs, self._sample.reference, self._mean)
        multiplier = first_order_multiplier(self._gain, effect.output_change, self._length)
        return effect._replace(multiplier=multiplier)


def effect_of(
    multiplier: float, before: Tensor, after: Tensor, reference: Tensor, mean: AnchorMean
) -> Effect:
    """What a step did to the outputs ``(N, m)`` of its anchors.

    Args:
        multiplier: The multiplier of Eq. 4.
        before: The outputs before the step.
        after: The outputs after it.
        reference: The outputs that they had at the reference.
        mean: The mean over these anchors.
    """
    drift = mean.of_each(squared_distance(after, reference))
    return Effect(multiplier, mean.rms(after - before), drift)


def first_order_multiplier(gain: float, change: float, length: float) -> float:
    r"""The multiplier of Eq. 4 restricted to the line of a step.

    It is negative if the step passes the minimum along the line.

    Args:
        gain: The gain of the step, :math:`-c^\top v`.
        change: How far it moves the outputs, RMS over anchors.
        length: The length of the sphere.
    """
    return (gain / 2 - change**2) / length**2
