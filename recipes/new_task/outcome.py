"""What one method found on its way from the first task to the second."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from recipes.common.files import replace


@dataclass
class Curve:
    """The networks that were tested, by the step that made them.

    Attributes:
        steps: The steps.
        task1: Test accuracies on task 1, percent.
        task2: Test accuracies on task 2, percent.
        drift: The drift on the remembered inputs.
        flips: The share of held-out inputs of task 1 whose prediction is not that of the start network.
        counted: The same share on the inputs on which the method's budget counts; None without a budget.
    """

    steps: list[int] = field(default_factory=list)
    task1: list[float] = field(default_factory=list)
    task2: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    flips: list[float] = field(default_factory=list)
    counted: list[float | None] = field(default_factory=list)

    def add(
        self,
        step: int,
        task1: float,
        task2: float,
        *,
        drift: float,
        flips: float,
        counted: float | None,
    ) -> None:
        """Appends one network."""
        self.steps.append(step)
        self.task1.append(task1)
        self.task2.append(task2)
        self.drift.append(drift)
        self.flips.append(flips)
        self.counted.append(counted)


@dataclass(frozen=True)
class Outcome:
    """What one method did on task 2.

    Attributes:
        curve: The networks on the way; the first is the start network.
        predictions_kept: The share of anchors whose predicted class is that of the start network.
        drift_held_out: As ``drift``, on test inputs of task 1.
        flips_at_most: The bound, with 95 % confidence, on the share of predictions on task 1 that has changed.
        certificate: What has changed on test inputs of task 1, as text.
        within_task: The accuracy on ``"task1"`` and ``"task2"`` among the classes of the task alone, in percent.
        remembered_megabytes: How much was kept of task 1.
        seconds: Seconds spent training on task 2, without those of tests.
        peak_megabytes: The most memory taken meanwhile, by the process or on the GPU; None if the system does not tell.
        scores: The probability ``(networks, images)`` of the right class, for the networks of ``curve`` and some test
            images, task 1's first.
        weights: The parameters ``(networks, n)`` of the networks that are drawn in weight space; None if none are.
    """

    curve: Curve
    predictions_kept: float
    drift_held_out: float
    flips_at_most: float
    certificate: str
    within_task: Mapping[str, float]
    remembered_megabytes: float
    seconds: float
    peak_megabytes: float | None
    scores: Tensor = field(repr=False)
    weights: Tensor | None = field(repr=False)

    def metrics(self) -> dict[str, float]:
        """The numbers of ``results.json``; accuracies in percent. Those that are not known are left out."""
        curve = self.curve
        found = {
            "task1_before": curve.task1[0],
            "task1_after": curve.task1[-1],
            "task1_worst_on_path": min(curve.task1),
            "task2_after": curve.task2[-1],
            "mean_after": (curve.task1[-1] + curve.task2[-1]) / 2,
            "backward_transfer": curve.task1[-1] - curve.task1[0],
            "task1_within_task": self.within_task["task1"],
            "task2_within_task": self.within_task["task2"],
            "drift": curve.drift[-1],
            "drift_held_out": self.drift_held_out,
            "predictions_kept": self.predictions_kept,
            "flips_held_out": curve.flips[-1],
            "flips_held_out_at_most": self.flips_at_most,
            "flips_counted": curve.counted[-1],
            "remembered_megabytes": self.remembered_megabytes,
            "steps": curve.steps[-1],
            "seconds": self.seconds,
            "peak_megabytes": self.peak_megabytes,
        }
        return {name: value for name, value in found.items() if value is not None}

    def state(self) -> dict[str, Any]:
        """The outcome as tensors and plain values, for :meth:`of`."""
        return {**vars(self), "curve": vars(self.curve)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Outcome:
        """Makes the outcome again from what :meth:`state` returned."""
        return cls(**{**state, "curve": Curve(**state["curve"])})


def write_curves(path: Path, curves: Mapping[str, Curve]) -> None:
    """Writes the tested networks as CSV, one a row: method, step, accuracies in percent, drift, and shares of flips."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            columns = ("steps", "task1", "task2", "drift", "flips", "counted")
            rows.writerow(["method", "step", *columns[1:]])
            for method, curve in curves.items():
                for row in zip(*(getattr(curve, name) for name in columns), strict=True):
                    rows.writerow([method, *row])

    replace(path, write)
