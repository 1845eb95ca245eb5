"""The table, ``results.json`` and the plots of ``recipes.split_tasks``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.common import report
from recipes.continual import figures as continual_figures
from recipes.continual import tables
from recipes.continual.tables import Row
from recipes.split_tasks import figures
from recipes.split_tasks.sequence import Record

RECIPE = "split_tasks"
_ROWS = [
    Row("within_task", "accuracy within tasks (%)", ".2f", compared=True),
    Row("all_classes", "among all classes (%)", ".2f", compared=True),
    Row("backward_transfer", "backward transfer", ".2f", compared=True),
    Row("worst_on_path", "worst earlier task on the way (%)", ".1f", compared=True),
    Row("drift_held_out", "drift on test inputs", ".3g", compared=True),
    Row("remembered_megabytes", "remembered (MB)", ".3g"),
    Row("peak_megabytes", "peak memory (MB)", ".0f"),
    Row("seconds", "seconds after the first task", ".1f", compared=True),
]


def report_all(
    out: Path,
    records: Mapping[str, Sequence[Record]],
    config: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Prints the table, and writes ``results.json`` and the plots.

    Args:
        out: The folder of the files.
        records: For each method what was found, one a seed.
        config: The configuration that ``results.json`` holds.
        device: The device on which the networks were trained.
    """
    runs = {method: [r.metrics() for r in found] for method, found in records.items()}
    print(f"\n{tables.summary(runs, _ROWS)}")
    metrics = tables.over_seeds(runs)
    for method, found in records.items():
        own = metrics if method == "fip" else metrics["baselines"][method]
        own["after_each_task"] = [r.within_task for r in found]
    report.write_results(
        out / "results.json",
        recipe=RECIPE,
        config=config,
        environment=report.environment(device),
        metrics=metrics,
    )
    first = {method: found[0] for method, found in records.items()}
    figures.tasks(out / "tasks.png", {m: r.within_task for m, r in first.items()})
    kinds = {"within_task": "within tasks", "all_classes": "among all classes"}
    continual_figures.bars(out / "bars.png", runs, kinds)
    continual_figures.score_maps(
        out / "scores.png",
        {m: (range(1, len(r.scores) + 1), torch.stack(r.scores)) for m, r in first.items()},
        ("all tasks, in turn",),
        along="tasks learnt",
    )
    weights = {m: torch.stack(r.weights) for m, r in first.items() if m in ("fip", "naive")}
    if weights:
        continual_figures.weight_space(out / "weights.png", weights)
    print(f"results.json and the plots are in {out}")
