"""The texts that ``recipes.sparsify`` prints (plan, line for each run, table), and the numbers of ``results.json``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.common import report
from recipes.sparsify.methods import METHODS
from recipes.sparsify.settings import SparsifySettings


def plan(
    methods: Sequence[str],
    sparsities: Sequence[float],
    settings: SparsifySettings,
    *,
    rewinds: bool,
) -> str:
    """The sparsities that each method visits, and its epochs.

    Args:
        methods: Names of methods.
        sparsities: The sparsities asked for, in increasing order.
        settings: The settings.
        rewinds: Whether the dense network's weights early in training will be known.
    """
    rows = [["", "% of the weights zero (waypoints)", "epochs"]]
    for name in methods:
        method = METHODS[name]
        legs = method.legs(sparsities, settings)
        shown = [(f"{100 * leg.sparsity:.4g}", leg.asked) for leg in legs]
        visited = ", ".join(text if asked else f"({text})" for text, asked in shown)
        if method.each_from_dense and len(legs) > 1:
            visited += ", each by itself"
        each = {leg.epochs for leg in legs}
        total = sum(leg.epochs for leg in legs)
        epochs = f"{len(legs)} x {each.pop()} = {total}" if len(each) == 1 else f"{total}"
        rows.append([method.full_title(settings, rewinds=rewinds), visited, epochs])
    return report.aligned(rows)


def line(seed: int, sparsities: Sequence[float], record: Mapping[str, Any]) -> str:
    """The accuracies of one run at each sparsity, in one line.

    Args:
        seed: The seed of the run.
        sparsities: The sparsities asked for.
        record: The record of the run.
    """
    networks = record["networks"]
    found = ", ".join(
        f"{sparsity:.4g}: {network['accuracy']:.2f}"
        for sparsity, network in zip(sparsities, networks, strict=True)
    )
    dense, seconds = record["dense_accuracy"], networks[-1]["seconds"]
    return f"seed {seed}, {record['title']}: dense {dense:.2f}; {found}; {seconds:.0f} s"


def metrics(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The metrics of ``results.json``: the path's networks, with the sparsest one's numbers on top, and the baselines.

    Args:
        records: The records of each method's runs, one a seed.
    """
    summaries = {method: _summary(runs) for method, runs in records.items()}
    titles = {method: runs[0]["title"] for method, runs in records.items()}
    first = next(iter(records.values()))
    dense = [run["dense_accuracy"] for run in first]
    metrics: dict[str, Any] = {
        "dense_accuracy": _mean(dense),
        "dense_accuracy_deviation": _std(dense),
    }
    if "fip" in summaries:
        path = summaries.pop("fip")
        metrics |= {"title": titles["fip"], **path[-1], "networks": path}
    metrics["baselines"] = {
        method: {"title": titles[method], **networks[-1], "networks": networks}
        for method, networks in summaries.items()
    }
    return metrics


def _summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The means over seeds at each sparsity, with the standard deviation of the accuracy."""
    summary = []
    for same in zip(*(run["networks"] for run in runs), strict=True):
        layers = same[0]["per_layer_sparsity"]
        summary.append(
            {
                **{key: same[0][key] for key in ("sparsity", "nonzero", "total")},
                "accuracy": _mean([n["accuracy"] for n in same]),
                "accuracy_deviation": _std([n["accuracy"] for n in same]),
                "accuracies": [n["accuracy"] for n in same],
                "agreement": _mean([n["agreement"] for n in same]),
                "seconds": _mean([n["seconds"] for n in same]),
                "per_layer_sparsity": {
                    layer: _mean([n["per_layer_sparsity"][layer] for n in same]) for layer in layers
                },
            }
        )
    return summary


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def table(records: Mapping[str, Sequence[Mapping[str, Any]]], sparsities: Sequence[float]) -> str:
    """The accuracies by sparsity, one column a method; the seconds are those to the last network.

    Args:
        records: The records of each method's runs, one a seed.
        sparsities: The sparsities asked for, in increasing order.
    """
    summaries = {method: _summary(runs) for method, runs in records.items()}
    first = next(iter(summaries.values()))

    def cell(entry: Mapping[str, Any]) -> str:
        deviation = entry["accuracy_deviation"]
        return f"{entry['accuracy']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")

    total = first[0]["total"]
    rows = [[f"sparsity of {total:,} weights", *(runs[0]["title"] for runs in records.values())]]
    for k in range(len(sparsities)):
        share = f"{first[k]['sparsity']:.2%} ({first[k]['nonzero']:,} left)"
        rows.append([share, *(cell(networks[k]) for networks in summaries.values())])
    rows.append(["seconds", *(f"{networks[-1]['seconds']:.1f}" for networks in summaries.values())])
    runs = next(iter(records.values()))
    dense = cell(
        {
            "accuracy": _mean([r["dense_accuracy"] for r in runs]),
            "accuracy_deviation": _std([r["dense_accuracy"] for r in runs]),
        }
    )
    return f"test accuracy (%); dense network {dense}\n{report.aligned(rows)}"
