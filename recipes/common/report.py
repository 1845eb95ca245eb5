"""What all recipes leave behind: ``results.json``, printed tables, and the statistics over seeds in both."""

from __future__ import annotations

import math
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from scipy import stats

from recipes.common.files import write_json

Metrics = Mapping[str, float | None]  # the metrics of one run; None if one could not be measured


def environment(device: torch.device) -> dict[str, str | int]:
    """The machine and the versions that ran the recipe, for ``results.json``."""
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


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text. The first row is the heading; the first column is aligned left, all others right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    printed = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    rule = "-" * len(printed[0])
    return "\n".join([printed[0], rule, *printed[1:]])


def paired(runs: Sequence[Metrics], others: Sequence[Metrics]) -> dict[str, dict[str, float]]:
    """How two methods differ on the same seeds.

    Args:
        runs: The metrics of one method, one run a seed; two runs or more.
        others: The metrics of the other method, for the same seeds in the same order.

    Returns:
        For each metric the ``mean`` of the differences ``runs`` less ``others``, and its ``standard_error``.

    Raises:
        ValueError: If one method has more runs than the other.
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
    """The mean of the values as text, ± the standard deviation (with n - 1) if there are several."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def mean_and_error(pair: Mapping[str, float], form: str) -> str:
    """A difference that :func:`paired` found as text: the mean with its sign ± its standard error."""
    return f"{pair['mean']:+{form}} ± {pair['standard_error']:{form}}"


def _cpu_name() -> str:
    """The processor's model name if the system tells it, otherwise its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or sys.platform
