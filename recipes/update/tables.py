"""The texts that ``recipes.update`` prints: lines for each run, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.common import report

Record = Mapping[str, Any]  # what one run of a method came to
Records = Mapping[str, Sequence[Record]]

# The figures of a network by their heading; each with its format.
COLUMNS = {
    "accuracy": ("all classes", ".2f"),
    "accuracy_old": ("old", ".2f"),
    "accuracy_new": ("new", ".2f"),
    "negative_flip_rate": ("negative flips", ".2f"),
    "relative_negative_flip_rate": ("relative", ".1f"),
    "positive_flip_rate": ("positive", ".2f"),
    "check_flip_rate": ("on check inputs", ".2f"),
    "seconds": ("seconds", ".1f"),
}


def titled(title: str, network: Mapping[str, Any]) -> str:
    """The name of a network in tables: the method's, and what tells it from the method's others."""
    return f"{title}, {network['name']}" if network["name"] else title


def lines(seed: int, record: Record) -> str:
    """What one run came to, one line a network, and a line more for a budget that is not kept."""
    found = []
    for network in record["networks"]:
        text = (
            f"seed {seed}, {titled(record['title'], network)}: {network['accuracy']:.2f} on all classes, "
            f"{network['accuracy_new']:.2f} on new ones, {network['negative_flips']} negative flips of "
            f"{network['old_test_inputs']} ({network['to_new_classes']} to new classes), "
            f"{network['check_flips']} of {network['check_inputs']} check inputs flipped"
        )
        account = network["account"]
        if "told" in account:
            text += f"\n  settled, beta {account['beta']:.3g}: {account['told']}"
        if network["within"] is False:
            text += f"\n  BUDGET NOT KEPT: {network['check_flip_rate']:.2f} % of the check inputs flipped"
        found.append(text)
    return "\n".join(found)


def networks(records: Records) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """Each network of each method: the method's name, the network's title, and its figures, one a seed."""
    return [
        (method, titled(runs[0]["title"], network), [run["networks"][k] for run in runs])
        for method, runs in records.items()
        for k, network in enumerate(runs[0]["networks"])
    ]


def table(records: Records) -> str:
    """One row a network, means ± standard deviations over seeds, in percent."""
    rows = [["percent", *(heading for heading, _ in COLUMNS.values())]]
    for _, title, runs in networks(records):
        cells = [
            report.mean_and_deviation([float(run[key]) for run in runs], form)
            for key, (_, form) in COLUMNS.items()
        ]
        rows.append([title, *cells])
    seeds = [run["networks"][0] for run in next(iter(records.values()))]
    before = [float(network["old_accuracy_before"]) for network in seeds]
    said = (
        f"Old classes before: {report.mean_and_deviation(before, '.2f')} % right. Flips are shares of the "
        f"{seeds[0]['old_test_inputs']} test inputs of old classes; on check inputs, of those that were right."
    )
    return f"{report.aligned(rows)}\n{said}"


def metrics(records: Records) -> dict[str, Any]:
    """The metrics of ``results.json``: means and deviations of each column, and every run."""
    found: dict[str, Any] = {}
    for method, title, runs in networks(records):
        columns = [{key: float(run[key]) for key in COLUMNS} for run in runs]
        found.setdefault(method, []).append(
            {
                "title": title,
                **report.means(columns),
                **({"deviations": report.deviations(columns)} if len(runs) > 1 else {}),
                "runs": [{k: v for k, v in run.items() if k != "text"} for run in runs],
            }
        )
    return found
