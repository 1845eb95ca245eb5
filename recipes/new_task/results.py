"""The tables, ``results.json``, ``path.csv`` and the plots of ``recipes.new_task``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.common import report
from recipes.continual import figures as continual_figures
from recipes.continual import tables
from recipes.continual.methods import METHODS
from recipes.continual.tables import Row
from recipes.new_task import figures
from recipes.new_task.outcome import Outcome, write_curves

RECIPE = "new_task"


def report_seed(
    folder: Path,
    outcomes: Mapping[str, Outcome],
    *,
    seed: int,
    tasks: tuple[str, str],
    config: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Prints the table of one seed, and writes its files and plots.

    Args:
        folder: The folder of the files.
        outcomes: The outcome of each method.
        seed: The seed, for the heading.
        tasks: The names of the two tasks.
        config: The configuration that ``results.json`` holds.
        device: The device on which the networks were trained.
    """
    runs = {name: [outcome.metrics()] for name, outcome in outcomes.items()}
    print(f"\nseed {seed}\n{tables.summary(runs, rows(*tasks))}")
    if "fip" in outcomes:
        print(f"\n{certified(outcomes['fip'], tasks[0])}\n")
    _draw(folder, outcomes, tasks, config["max_flips"])
    write_curves(folder / "path.csv", {name: o.curve for name, o in outcomes.items()})
    report.write_results(
        folder / "results.json",
        recipe=RECIPE,
        config=config,
        environment=report.environment(device),
        metrics=tables.over_seeds(runs),
    )
    print(f"results.json, path.csv and the plots are in {folder}", flush=True)


def report_seeds(
    out: Path,
    outcomes: Mapping[str, Sequence[Outcome]],
    *,
    tasks: tuple[str, str],
    config: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Prints the table over several seeds, and writes ``results.json`` and the bars; see :func:`report_seed`."""
    runs = {name: [outcome.metrics() for outcome in found] for name, found in outcomes.items()}
    print(f"\nseeds {', '.join(map(str, config['seeds']))}: mean ± standard deviation")
    print(tables.summary(runs, rows(*tasks)))
    continual_figures.bars(out / "bars.png", runs, _bars(*tasks))
    report.write_results(
        out / "results.json",
        recipe=RECIPE,
        config=config,
        environment=report.environment(device),
        metrics=tables.over_seeds(runs),
    )
    print(f"the means are in {out}/results.json")


def rows(task1: str, task2: str) -> list[Row]:
    """The rows of the table, for tasks of these names."""
    return [
        Row("task1_before", f"{task1} before (%)", ".2f"),
        Row("task1_after", f"{task1} after (%)", ".2f", compared=True),
        Row("task1_worst_on_path", f"{task1} worst on path (%)", ".2f", compared=True),
        Row("task2_after", f"{task2} after (%)", ".2f", compared=True),
        Row("mean_after", "mean after (%)", ".2f", compared=True),
        Row("task1_within_task", f"{task1} within its classes (%)", ".2f"),
        Row("task2_within_task", f"{task2} within its classes (%)", ".2f"),
        Row("drift", "drift on anchors", ".3g", compared=True),
        Row("drift_held_out", f"drift on {task1} test", ".3g", compared=True),
        Row("predictions_kept", "anchor predictions kept", ".1%"),
        Row("flips_held_out", f"predictions changed, {task1} test", ".2%", compared=True),
        Row("flips_held_out_at_most", "  at most, with 95 % confidence", ".2%"),
        Row("remembered_megabytes", "remembered (MB)", ".3g"),
        Row("peak_megabytes", "peak memory (MB)", ".0f"),
        Row("steps", f"steps on {task2}", ".0f"),
        Row("seconds", f"seconds on {task2}", ".1f", compared=True),
    ]


def certified(outcome: Outcome, task1: str) -> str:
    """The certificate of the path, and what it says in a sentence."""
    return (
        f"{METHODS['fip'].title}, test inputs of {task1}, none of them remembered\n{outcome.certificate}\n"
        f"At most {outcome.flips_at_most:.2%} of all predictions on {task1} changed, with 95 % confidence."
    )


def _bars(task1: str, task2: str) -> dict[str, str]:
    return {
        "task1_after": task1,
        "task2_after": task2,
        "mean_after": "mean of both",
        "task1_worst_on_path": f"{task1}, worst on the way",
    }


def _draw(
    folder: Path,
    outcomes: Mapping[str, Outcome],
    tasks: tuple[str, str],
    max_flips: float | None,
) -> None:
    task1, task2 = tasks
    curves = {name: o.curve for name, o in outcomes.items()}
    figures.curves(folder / "path.png", curves, task1=task1, task2=task2)
    if max_flips is not None and "fip" in curves:
        figures.budget(folder / "budget.png", curves, max_flips=max_flips, task1=task1, task2=task2)
    continual_figures.score_maps(
        folder / "scores.png",
        {name: (o.curve.steps, o.scores) for name, o in outcomes.items()},
        tasks,
        along=f"steps on {task2}",
    )
    continual_figures.bars(
        folder / "bars.png", {name: [o.metrics()] for name, o in outcomes.items()}, _bars(*tasks)
    )
    weights = {name: o.weights for name, o in outcomes.items() if o.weights is not None}
    if weights:
        continual_figures.weight_space(folder / "weights.png", weights)
