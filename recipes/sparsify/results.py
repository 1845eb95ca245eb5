"""The results of all runs of ``recipes.sparsify``: the table, ``results.json``, the plots and exported networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fipoptim.secondary import SparseProjection
from recipes.common import report
from recipes.sparsify import figures, tables
from recipes.sparsify.experiment import SparsifyExperiment
from recipes.sparsify.export import export as export_network

RECIPE = "sparsify"
Records = Mapping[str, Sequence[Mapping[str, Any]]]


def report_results(
    experiment: SparsifyExperiment, records: Records, seeds: Sequence[int], *, export: bool
) -> None:
    """Prints the table, writes ``results.json`` and draws the plots.

    Args:
        experiment: The finished runs.
        records: The records of each method's runs, one a seed.
        seeds: The seeds.
        export: Whether the networks of the first seed are also exported (:mod:`recipes.sparsify.export`).
    """
    out, sparsities = experiment.out, experiment.sparsities
    print(f"\n{tables.table(records, sparsities)}")
    report.write_results(
        out / "results.json",
        recipe=RECIPE,
        config={**experiment.config, "seeds": list(seeds)},
        environment=_environment(records),
        metrics=tables.metrics(records),
    )
    figures.accuracies(out / "accuracy.png", records)
    prunable = SparseProjection(
        experiment.network.build(), 0.0, keep=experiment.settings.keep
    ).names
    if "fip" in records:
        sparsest = [experiment.load_network(seed, "fip", sparsities[-1]) for seed in seeds]
        figures.layers(out / "layers.png", sparsest, prunable)
        path, positions = experiment.load_path(seeds[0], "fip")
        title = records["fip"][0]["title"]
        figures.weight_space(
            out / "weights.png", path, positions=positions, title=title, seed=seeds[0]
        )
    for method in records if export else ():
        for sparsity in sparsities:
            folder = out / "export" / f"{method}-{sparsity}"
            state = experiment.load_network(seeds[0], method, sparsity)
            print(f"exported {folder}: {export_network(state, prunable, folder)}")
    print(f"results.json, the networks and the plots are in {out}")


def _environment(records: Records) -> dict[str, Any]:
    """The environment of the finished runs, some of which may be another machine's; by method if not all are alike."""
    found = {method: [run["environment"] for run in runs] for method, runs in records.items()}
    everything = [environment for runs in found.values() for environment in runs]
    alike = all(environment == everything[0] for environment in everything)
    return everything[0] if alike else found
