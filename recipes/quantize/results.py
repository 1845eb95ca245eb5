"""The results of all runs of ``recipes.quantize``: the table, ``results.json``, the plot and exported networks."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.common import report
from recipes.quantize import figures, tables
from recipes.quantize.experiment import QuantizeExperiment
from recipes.quantize.export import export as export_network

RECIPE = "quantize"


def report_results(
    experiment: QuantizeExperiment, records: tables.Records, seeds: Sequence[int], *, export: bool
) -> None:
    """Prints the table, writes ``results.json`` and draws the plot.

    Args:
        experiment: The finished runs.
        records: The records of each method's runs, one a seed.
        seeds: The seeds.
        export: Whether the networks of the first seed are also exported (:mod:`recipes.quantize.export`).
    """
    out = experiment.out
    print(f"\n{tables.table(records)}")
    report.write_results(
        out / "results.json",
        recipe=RECIPE,
        config={**experiment.config, "seeds": list(seeds)},
        environment=next(iter(records.values()))[0]["environment"],
        metrics=tables.metrics(records),
    )
    figures.accuracies(out / "accuracy.png", records)
    for method in records if export else ():
        for bits in experiment.settings.bits:
            folder = out / "export" / f"{method}-{bits}"
            state, grids = experiment.load_network(seeds[0], method, bits)
            sizes = export_network(state, grids, bits, folder)
            print(
                f"exported {folder}: {sizes['quantized']:,} bytes packed, {sizes['weights']:,} as float32"
            )
    print(f"results.json, the networks and the plot are in {out}")
