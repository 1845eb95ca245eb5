"""Tables of the continual-learning recipes: the methods side by side, and the path less each of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recipes.common import report
from recipes.common.report import Metrics
from recipes.continual.learners import METHODS


@dataclass(frozen=True)
class Row:
    """A metric as the tables show it.

    Attributes:
        metric: Its name in ``results.json``.
        label: What is printed.
        form: How numbers are, as :func:`format` has it.
        compared: Whether the methods are told apart by it: paired differences are printed.
    """

    metric: str
    label: str
    form: str
    compared: bool = False


def table(methods: Mapping[str, Sequence[Metrics]], rows: Sequence[Row]) -> str:
    """The methods side by side, one column each; several runs as mean ± standard deviation (with n - 1).

    Args:
        methods: For each method the metrics of its runs, one a seed.
        rows: What to print of them; a metric that no run of a method has is "unknown" there.
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
        rows: Of these the ``compared`` ones are printed.
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
    """The table; below it, where there are several seeds and something to compare, the paired differences."""
    text = table(methods, rows)
    seeds = max(len(runs) for runs in methods.values())
    if seeds < 2 or "fip" not in methods or len(methods) < 2:
        return text
    note = f"paired differences on these {seeds} seeds, mean ± standard error"
    return f"{text}\n\n{note}\n{paired_table(methods, rows)}"
