"""The texts that ``recipes.quantize`` prints (a line for each run, the table), and the numbers of ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.common import report

Records = Mapping[str, Sequence[Mapping[str, Any]]]

COLUMNS = {
    "accuracy": ("test accuracy (%)", ".2f"),
    "agreement": ("agreement (%)", ".2f"),
    "drift": ("drift", ".3g"),
    "seconds": ("seconds", ".1f"),
}


def line(seed: int, record: Mapping[str, Any]) -> str:
    """The accuracies of one run at each number of bits, in one line."""
    networks = record["networks"]
    found = ", ".join(f"{n['bits']} bits {n['accuracy']:.2f}" for n in networks)
    seconds = sum(n["seconds"] for n in networks)
    return f"seed {seed}, {record['title']}: dense {record['dense_accuracy']:.2f}; {found}; {seconds:.0f} s"


def table(records: Records) -> str:
    """A row for each number of bits and method, means ± standard deviations over seeds.

    Args:
        records: The records of each method's runs, one a seed.
    """
    rows = [["bits a weight", "", *(heading for heading, _ in COLUMNS.values()), "bytes"]]
    first = next(iter(records.values()))
    for k, network in enumerate(first[0]["networks"]):
        for number, runs in enumerate(records.values()):
            same = [run["networks"][k] for run in runs]
            cells = [
                report.mean_and_deviation([n[key] for n in same], form)
                for key, (_, form) in COLUMNS.items()
            ]
            bits = f"{network['bits']} ({network['bits_a_weight']:.2f})" if number == 0 else ""
            rows.append([bits, runs[0]["title"], *cells, f"{same[0]['bytes']:,}"])
    dense = report.mean_and_deviation([run["dense_accuracy"] for run in first], ".2f")
    return f"dense network {dense}; bits with the scales in brackets\n{report.aligned(rows)}"


def metrics(records: Records) -> dict[str, Any]:
    """The metrics of ``results.json``: for each method its networks, with means, deviations and every run."""
    first = next(iter(records.values()))
    found: dict[str, Any] = {"dense_accuracies": [run["dense_accuracy"] for run in first]}
    for method, runs in records.items():
        networks = []
        for same in zip(*(run["networks"] for run in runs), strict=True):
            columns = [{key: float(n[key]) for key in COLUMNS} for n in same]
            fixed = {key: same[0][key] for key in ("bits", "bits_a_weight", "bytes")}
            deviations = {"deviations": report.deviations(columns)} if len(runs) > 1 else {}
            networks.append({**fixed, **report.means(columns), **deviations, "runs": columns})
        found[method] = {"title": runs[0]["title"], "networks": networks}
    return found
