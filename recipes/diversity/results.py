"""The results of all runs of ``recipes.diversity``: the table, ``results.json`` and the plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from recipes.common import report
from recipes.diversity import figures, tables
from recipes.diversity.evaluation import PICTURED
from recipes.diversity.experiment import START, DiversityExperiment

RECIPE = "diversity"
Records = Mapping[str, Sequence[Mapping[str, Any]]]


def report_results(
    experiment: DiversityExperiment, records: Records, seeds: Sequence[int], device: torch.device
) -> None:
    """Prints the table, writes ``results.json`` and draws the plots.

    Args:
        experiment: The finished runs.
        records: The records of each method's ensembles, one a seed.
        seeds: The seeds.
        device: The device of the runs.
    """
    out, seed = experiment.out, seeds[0]
    starts = experiment.results(seeds, [START])[START]
    print(f"\n{tables.table(records, starts, experiment.attacks)}")
    report.write_results(
        out / "results.json",
        recipe=RECIPE,
        config={**experiment.config, "seeds": list(seeds)},
        environment=report.environment(device),
        metrics=tables.metrics(records, starts),
    )
    figures.attacks(out / "attacks.png", records, starts)
    figures.coherence(out / "coherence.png", records)
    figures.layers(out / "layers.png", records)
    files = {method: experiment.tensor_files(seed, method) for method in records}
    figures.weight_space(out / "weights.png", experiment.start_file(seed), files)
    _draw_pictures(experiment, records, seed)
    print(f"results.json, the members and the plots are in {out}")


def _draw_pictures(experiment: DiversityExperiment, records: Records, seed: int) -> None:
    evaluation = experiment.evaluation
    attacked = experiment.load_attacked(seed)[experiment.attacks.table_eps]
    images = {"clean": evaluation.images[:PICTURED], "attacked": attacked[:PICTURED]}
    start = evaluation.pixels(experiment.load_start(seed))
    predicted = {method: found[0]["shown"] for method, found in records.items()}
    figures.pictures(
        experiment.out / "pictures.png",
        {kind: x.cpu() for kind, x in images.items()},
        {START: evaluation.pictured(start, images), **predicted},
    )
