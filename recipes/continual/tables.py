"""Tables of the continual-learning recipes: the methods side by side, and the path less each other method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.common import report
from recipes.common.report import Metrics
from recipes.continual.methods import METHODS


@dataclass(frozen=True)
class Row:
    """A metric as the tables show it.

    Attributes:
        metric: Its name in ``results.json``.
        label: What is printed.
        form: The format of its numbers, for :func:`format`.
        compared: Whether paired differences of it are printed.
    """

    metric: str
    label: str
    form: str
    compared: bool = False


def table(methods: Mapping[str, Sequence[Metrics]], rows: Sequence[Row]) -> str:
    """The methods side by side, one column each; several runs as mean ± standard deviation (with n - 1).

    Args:
        methods: For each method the metrics of its runs, one a seed.
        rows: The metrics to print; one that no run of a method has is "unknown" there.
    """
    body = []
    for row in rows:
        known = [
            [value for run in runs if (value := run.get(row.metric)) is not None]
            for runs in methods.values()
        ]
        cells = [report.mean_and_deviation(v, row.form) if v else "unknown" for v in known]
        body.append([row.label, *cells])
    return report.aligned([["", *(METHODS[name].title for name in methods)], *body])


def paired_table(methods: Mapping[str, Sequence[Metrics]], rows: Sequence[Row]) -> str:
    """The path less each other method on the same seeds: mean of the differences ± its standard error.

    Args:
        methods: As for :func:`table`, with two seeds or more, the path (``fip``) and another method.
        rows: The metrics; only those that are ``compared`` are printed.
    """
    others = {name: runs for name, runs in methods.items() if name != "fip"}
    found = {name: report.paired(methods["fip"], runs) for name, runs in others.items()}
    body = []
    for row in (row for row in rows if row.compared):
        pairs = [differences.get(row.metric) for differences in found.values()]
        cells = [report.mean_and_error(pair, row.form) if pair else "unknown" for pair in pairs]
        body.append([row.label, *cells])
    head = f"{METHODS['fip'].title} less"
    return report.aligned([[head, *(METHODS[name].title for name in found)], *body])


def summary(methods: Mapping[str, Sequence[Metrics]], rows: Sequence[Row]) -> str:
    """The table, and below it the paired differences if there are several seeds and methods to compare."""
    text = table(methods, rows)
    seeds = max(len(runs) for runs in methods.values())
    if seeds < 2 or "fip" not in methods or len(methods) < 2:
        return text
    note = f"paired differences on these {seeds} seeds, mean ± standard error"
    return f"{text}\n\n{note}\n{paired_table(methods, rows)}"


def over_seeds(methods: Mapping[str, Sequence[Metrics]]) -> dict[str, Any]:
    """The metrics of all methods as ``results.json`` holds them: the path's on top, the others' under ``baselines``.

    Each method has the means over its runs. If there are several runs, it also has their standard ``deviations``, the
    metrics of each run (``by_seed``), and, unless it is the path, its ``report.paired`` differences from the path
    (``path_less_this``).

    Args:
        methods: For each method the metrics of its runs, one a seed, in the same order for all methods.
    """
    path = methods.get("fip")
    found: dict[str, dict[str, Any]] = {}
    for name, runs in methods.items():
        known = [{k: v for k, v in run.items() if v is not None} for run in runs]
        found[name] = dict(report.means(known))
        if len(runs) > 1:
            found[name] |= {"deviations": report.deviations(known), "by_seed": known}
            if path is not None and name != "fip":
                found[name]["path_less_this"] = report.paired(path, runs)
    return {**found.pop("fip", {}), "baselines": found}
