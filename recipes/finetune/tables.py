"""The texts that ``recipes.finetune`` prints: a line for each network, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.common import report

Records = Mapping[str, Sequence[Mapping[str, Any]]]

COLUMNS = {
    "accuracy": ".1f",
    "nll": ".3f",
    "drift": ".5f",
    "kept": ".1f",
    "steps": ".3g",
    "seconds": ".1f",
}


def line(seed: int, title: str, point: Mapping[str, Any]) -> str:
    """What one network came to, in one line."""
    text = (
        f"seed {seed}, {named(title, point.get('choice', {}))}: {point['accuracy']:.1f} % right, "
        f"NLL {point['nll']:.3f}, drift {point['drift']:.5f}, {point['kept']:.1f} % kept"
    )
    if "steps" in point:
        text += f", {point['steps']} steps in {point['seconds']:.1f} s"
    return text


def named(title: str, choice: Mapping[str, float]) -> str:
    """A method with its settings."""
    return " ".join([title, *(f"{name} {value:g}" for name, value in choice.items())])


def table(records: Records) -> str:
    """One row for each choice of each method: means ± standard deviations over seeds.

    Args:
        records: The records of each method's runs, one a seed.
    """
    kept = next(iter(records.values()))[0]["kept_title"]
    rows = [["", "accuracy (%)", "NLL", "drift", f"{kept} (%)", "steps", "seconds"]]
    for runs in records.values():
        for points in of_choices(runs):
            cells = [
                report.mean_and_deviation([float(p[key]) for p in points], form)
                for key, form in COLUMNS.items()
            ]
            rows.append([named(runs[0]["title"], points[0]["choice"]), *cells])
    return report.aligned(rows)


def of_choices(runs: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    """The points of one method, those of one choice together: one a seed."""
    return [list(points) for points in zip(*(run["points"] for run in runs), strict=True)]


def metrics(records: Records) -> dict[str, Any]:
    """The metrics of ``results.json``: for each choice means and deviations of each column, and every run."""
    found = {}
    for method, runs in records.items():
        entries = []
        for points in of_choices(runs):
            columns = [{key: float(p[key]) for key in COLUMNS} for p in points]
            entries.append(
                {
                    "choice": points[0]["choice"],
                    **report.means(columns),
                    **({"deviations": report.deviations(columns)} if len(runs) > 1 else {}),
                    "runs": [
                        {**own, "account": p["account"], "certificate": p["certificate"]}
                        for own, p in zip(columns, points, strict=True)
                    ],
                }
            )
        found[method] = {"title": runs[0]["title"], "points": entries}
    return found
