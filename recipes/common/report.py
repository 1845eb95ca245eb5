"""What a recipe leaves behind: a printed table, ``results.json``, the path as CSV."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from scipy import stats
from torch import Tensor

Metrics = Mapping[str, float | None]  # of one run; None where it could not be measured

# In indented JSON: a list or mapping with none within.
_INNERMOST = re.compile(r"([\[{])\n([^\[\]{}]*)([\]}])")
_BREAK = re.compile(r"\n *")


@dataclass
class Curve:
    """Test accuracies (percent) and drift of the networks visited, in order of the step that made them."""

    steps: list[int] = field(default_factory=list)
    task1: list[float] = field(default_factory=list)
    task2: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)

    def add(self, step: int, task1: float, task2: float, drift: float) -> None:
        """Appends one network."""
        self.steps.append(step)
        self.task1.append(task1)
        self.task2.append(task2)
        self.drift.append(drift)


@dataclass(frozen=True)
class Outcome:
    """One way of training on task 2: where it went and what that cost.

    Attributes:
        curve: The networks on the way; the first is the start network.
        predictions_kept: Fraction of anchors whose predicted class is that of the start network.
        drift_held_out: The same measure as ``drift``, on task 1's test inputs.
        within_task: Accuracy on ``"task1"`` and ``"task2"`` where the task is known (task-aware), percent.
        remembered_megabytes: What was kept of task 1.
        seconds: Time spent training on task 2, tests not counted.
        peak_megabytes: Most memory taken meanwhile, by the process or on the GPU; None where the system does not tell.
        scores: ``(networks, images)``: of the networks of ``curve``, the probability of the right class for some
            test images, task 1's first.
        weights: ``(networks, n)``: their parameters, where these are drawn.
    """

    curve: Curve
    predictions_kept: float
    drift_held_out: float
    within_task: Mapping[str, float]
    remembered_megabytes: float
    seconds: float
    peak_megabytes: float | None
    scores: Tensor = field(repr=False)
    weights: Tensor | None = field(repr=False)

    def metrics(self) -> dict[str, float]:
        """The numbers of ``results.json``; accuracies in percent."""
        curve = self.curve
        peak = {} if self.peak_megabytes is None else {"peak_megabytes": self.peak_megabytes}
        return {
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
            "remembered_megabytes": self.remembered_megabytes,
            "steps": curve.steps[-1],
            "seconds": self.seconds,
            **peak,
        }

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, from which :meth:`of` makes it again."""
        return {**vars(self), "curve": vars(self.curve)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Outcome:
        """What :meth:`state` was taken of."""
        return cls(**{**state, "curve": Curve(**state["curve"])})


def environment(device: torch.device) -> dict[str, str | int]:
    """What ran the recipe, for ``results.json``."""
    found: dict[str, str | int] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def write_results(
    path: Path,
    *,
    recipe: str,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> None:
    """Writes ``results.json`` whole or not at all."""
    content = {
        "recipe": recipe,
        "config": config,
        "environment": environment,
        "metrics": metrics,
    }
    write_json(path, content)


def read_json(path: Path) -> dict[str, Any] | None:
    """What ``write_json`` left there; None if there is no such file."""
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all, its innermost lists and mappings on a line each."""
    text = _INNERMOST.sub(_on_a_line, json.dumps(content, indent=2)) + "\n"
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _on_a_line(found: re.Match[str]) -> str:
    opening, inside, closing = found.groups()
    # Strings are left as they are: JSON escapes the line breaks in them.
    return f"{opening}{_BREAK.sub(' ', inside.strip())}{closing}"


def write_curves(path: Path, curves: Mapping[str, Curve]) -> None:
    """Writes the visited networks as CSV, one a row: method, step, accuracies in percent, drift."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["method", "step", "task1", "task2", "drift"])
            for method, curve in curves.items():
                for row in zip(curve.steps, curve.task1, curve.task2, curve.drift, strict=True):
                    rows.writerow([method, *row])

    replace(path, write)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text: the first is the heading, the first column is to the left, numbers are to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    printed = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    rule = "-" * len(printed[0])
    return "\n".join([printed[0], rule, *printed[1:]])


def over_seeds(methods: Mapping[str, Sequence[Metrics]]) -> dict[str, Any]:
    """The metrics of all methods as ``results.json`` holds them: the path's on top, the others' under ``baselines``.

    Of each method the means over its runs. Where there are several, also their standard ``deviations``, each run's own
    (``by_seed``), and for the others ``path_less_this``: :func:`paired` with the path's runs.

    Args:
        methods: Under the name of each method the metrics of its runs, one a seed, in the same order for all.
    """
    path = methods.get("fip")
    found: dict[str, dict[str, Any]] = {}
    for name, runs in methods.items():
        known = [{k: v for k, v in run.items() if v is not None} for run in runs]
        found[name] = dict(means(known))
        if len(runs) > 1:
            found[name] |= {"deviations": deviations(known), "by_seed": known}
            if path is not None and name != "fip":
                found[name]["path_less_this"] = paired(path, runs)
    return {**found.pop("fip", {}), "baselines": found}


def paired(runs: Sequence[Metrics], others: Sequence[Metrics]) -> dict[str, dict[str, float]]:
    """How two methods differ on the same seeds.

    Args:
        runs: The metrics of one, one run a seed; two or more.
        others: Those of the other, of the same seeds in the same order.

    Returns:
        Of each metric the ``mean`` of ``runs`` less ``others``, pair by pair, and its ``standard_error``.

    Raises:
        ValueError: If there are more of one than of the other.
    """
    found = {}
    for key in runs[0]:
        pairs = [(a.get(key), b.get(key)) for a, b in zip(runs, others, strict=True)]
        known = [a - b for a, b in pairs if a is not None and b is not None]
        if len(known) == len(pairs):
            error = statistics.stdev(known) / math.sqrt(len(known))
            found[key] = {"mean": statistics.fmean(known), "standard_error": error}
    return found


def means(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each metric's mean over runs."""
    return {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}


def deviations(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each metric's standard deviation over two or more runs (with n - 1)."""
    return {key: statistics.stdev(run[key] for run in runs) for key in runs[0]}


def intervals(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Half the width of each metric's 95 % confidence interval (Student's t) over two or more runs."""
    t = float(stats.t.ppf(0.975, len(runs) - 1))
    return {key: t * s / math.sqrt(len(runs)) for key, s in deviations(runs).items()}


def mean_and_deviation(values: Sequence[float], form: str) -> str:
    """Their mean, with the standard deviation (with n - 1) where there are several."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def mean_and_error(pair: Mapping[str, float], form: str) -> str:
    """One of the differences that :func:`paired` finds: the mean with its sign ± its standard error."""
    return f"{pair['mean']:+{form}} ± {pair['standard_error']:{form}}"


def _cpu_name() -> str:
    """The processor's model name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or sys.platform


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside ``path`` and renames, so that an interrupted run leaves no half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
