"""Accuracy on a new task against loss of the old, at equal time: ``python -m benchmarks.trade_off --data-root DIR``.

A network trained on MNIST learns Fashion-MNIST for a short time, once along the invariant path and once by tuned
distillation, with the same anchors. Both methods get the time that the path takes for 10, 30, 100 and 300 steps. Both
are run on a grid of step lengths (learning rates) and strengths, with equally many points for each method. The table
and the plot show the whole curve: for each accuracy on the new task the least drift on test inputs of the old one, and
the highest accuracy on the old task of the worst network along the way.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm

from benchmarks import record
from fipoptim import AnchorBatch
from recipes.common import report, stored
from recipes.common.augment import many
from recipes.common.data import DataError, Task, load_pair
from recipes.common.networks import network_for
from recipes.common.options import SEED, Distinct, fraction, whole
from recipes.common.training import accuracy, minibatches, seed_everything
from recipes.continual.methods import METHODS, make_learner, options_of
from recipes.continual.methods.base import Learner
from recipes.continual.options import config_of
from recipes.continual.remembered import draw_remembered
from recipes.new_task.learning import learn_first_task
from recipes.new_task.settings import DEFAULTS, NewTaskSettings

# Steps of the path. Distillation takes as many steps as fit into the same time.
STEPS = (10, 30, 100, 300)
# Momentum for each number of steps; for distillation it is Adam's first beta. The values were chosen on held-out
# images, because the momentum of the recipes is too high for so few steps.
MOMENTUM = {
    "fip": {10: 0.5, 30: 0.5, 100: 0.7, 300: 0.7},
    "distillation": {10: 0.5, 30: 0.5, 100: 0.5, 300: 0.5},
}
# The values of eps and of beta for the path, and of the learning rate and of the strength for distillation.
GRID = {
    "fip": ((1.0, 2.0, 4.0), (20.0, 80.0)),
    "distillation": ((1e-3, 3e-3, 6e-3), (0.005, 0.02)),
}
# The network is tested after these steps, and after the last one.
TESTED_STEPS = (1, 2, 3, 5, 10, 20, 50, 100, 200)
# Anchors in one step. With the 25 anchors of the recipe the path drifts farther in runs this short.
ANCHOR_BATCH = 50
# Long steps would take products, and twice the time. Without products they are shortened to the radius of the recipe.
PRODUCTS = 0
# The time of a step is compared over this many rounds, with this many steps of each method in a round.
TIMED_ROUNDS, TIMED_STEPS = 9, 24
# Test inputs of the old task: for the accuracy along the way, and for the drift at the end.
ACCURACY_INPUTS, DRIFT_INPUTS = 1000, 2000
Point = dict[str, Any]


def points(
    tasks: tuple[Task, Task], settings: NewTaskSettings, *, ratio: float, seed: int, progress: bool
) -> list[Point]:
    """Runs both methods with every number of steps, rate and strength, each time from the same network.

    Args:
        tasks: The old task, and the new one.
        settings: The settings of the recipe; momentum, step length (learning rate) and strength are replaced.
        ratio: The seconds of a step of the path, divided by those of a step of distillation.
        seed: The seed of the weights, batches and anchors.
        progress: Whether to show a progress bar.

    Returns:
        One point for each run: its setting, its seconds, the drift on test inputs of the old task, and accuracies (%)
        on the test inputs of both tasks.
    """
    seed_everything(seed)
    task1, task2 = tasks
    model = network_for("mnist", task1.classes + task2.classes)
    learn_first_task(model, task1, settings, seed=seed, progress=progress)
    remembered = draw_remembered(task1, settings.anchors, seed)
    results = []
    runs = [
        (method, steps, rate, strength)
        for steps in STEPS
        for method, grid in GRID.items()
        for rate, strength in itertools.product(*grid)
    ]
    for method, steps, rate, strength in tqdm(runs, desc=f"seed {seed}", disable=not progress):
        steps_taken = steps if method == "fip" else round(steps * ratio)
        net = copy.deepcopy(model)
        momentum = MOMENTUM[method][steps]
        learner = _learner(method, net, task1.name, settings, momentum, rate, strength, seed=seed)
        learner.remember(*remembered)
        old_task = _OldTask(net, task1, steps_taken)
        batches = minibatches(task2, batch_size=settings.batch_size, epochs=1, seed=seed + 1)
        seconds = learner.learn(
            itertools.islice(batches, steps_taken),
            steps=steps_taken,
            after_step=old_task.after_step,
        )
        results.append(
            {
                "method": method,
                "time": steps,
                "steps": steps_taken,
                "momentum": momentum,
                "rate": rate,
                "strength": strength,
                "seconds": seconds,
                "drift": old_task.anchors.drift(),
                "task1": accuracy(net, task1.test_inputs, task1.test_labels),
                "task1_worst": old_task.worst_accuracy,
                "task2": accuracy(net, task2.test_inputs, task2.test_labels),
            }
        )
    return results


def _learner(
    method: str,
    model: nn.Module,
    old_data: str,
    settings: NewTaskSettings,
    momentum: float,
    rate: float,
    strength: float,
    *,
    seed: int,
) -> Learner:
    """Returns the recipe's learner of ``method`` with another momentum, rate and strength."""
    changes = (
        {"momentum": momentum, "eps": rate, "beta": strength}
        if method == "fip"
        else {"momentum": momentum, "lr": rate, "strength": strength}
    )
    options = dataclasses.replace(options_of(method, settings), **changes)
    chosen = dataclasses.replace(settings, methods={**settings.methods, method: options})
    return make_learner(
        method,
        model,
        chosen,
        augment=many(old_data, settings.views) if settings.augment else None,
        seed=seed,
        freeze_batch_norm=True,
    )


def step_ratio(tasks: tuple[Task, Task], settings: NewTaskSettings, *, seed: int) -> float:
    """Returns the seconds of a step of the path, divided by those of a step of distillation.

    The methods take turns. Each round gives a ratio, because a shared machine may be slower in one round than in the
    next; the median of these ratios is returned.
    """
    ratios = []
    for _ in range(TIMED_ROUNDS):
        ours, theirs = (
            statistics.median(_step_seconds(method, tasks, settings, seed=seed)) for method in GRID
        )
        ratios.append(ours / theirs)
    return statistics.median(ratios)


def _step_seconds(
    method: str, tasks: tuple[Task, Task], settings: NewTaskSettings, *, seed: int
) -> list[float]:
    """Returns the seconds of single steps of a method.

    The rate and strength are from the middle of the method's grid. The first half of the steps is left out, because
    the network is traced there.
    """
    task1, task2 = tasks
    rate, strength = (values[len(values) // 2] for values in GRID[method])
    momentum = MOMENTUM[method][STEPS[-1]]
    model = network_for("mnist", task1.classes + task2.classes)
    learner = _learner(method, model, task1.name, settings, momentum, rate, strength, seed=seed)
    learner.remember(*draw_remembered(task1, settings.anchors, seed))
    batches = minibatches(task2, batch_size=settings.batch_size, epochs=1, seed=seed)
    ends: list[float] = []
    learner.learn(
        itertools.islice(batches, TIMED_STEPS),
        steps=TIMED_STEPS,
        after_step=lambda step: ends.append(time.perf_counter()),
    )
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    return seconds[len(seconds) // 2 :]


class _OldTask:
    """Measures a network on test inputs of the old task while it learns the new one.

    Args:
        model: The network.
        task: The old task.
        steps: The number of the last step.

    Attributes:
        anchors: The test inputs on which drift is measured, with the outputs of the network before the first step.
        worst_accuracy: The lowest accuracy (%) after any of the tested steps.
    """

    def __init__(self, model: nn.Module, task: Task, steps: int) -> None:
        self.model, self.task, self.steps = model, task, steps
        self.anchors = AnchorBatch(model, task.test_inputs[:DRIFT_INPUTS])
        self.worst_accuracy = 100.0

    def after_step(self, step: int) -> None:
        """Tests the network if ``step`` is one of the tested steps or the last."""
        if step in TESTED_STEPS or step == self.steps:
            x = self.task.test_inputs[:ACCURACY_INPUTS]
            y = self.task.test_labels[:ACCURACY_INPUTS]
            now = accuracy(self.model, x, y, batch_size=500)
            self.worst_accuracy = min(self.worst_accuracy, now)


def seed_by_seed(
    tasks: tuple[Task, Task],
    settings: NewTaskSettings,
    seeds: Sequence[int],
    *,
    config: dict[str, Any],
    out: Path,
    resume: bool,
    progress: bool,
) -> list[list[Point]]:
    """Runs :func:`points` for each seed, and writes the points to a file after each.

    Args:
        tasks: The old task, and the new one.
        settings: The settings of the recipe.
        seeds: The seeds, in the order in which they are run.
        config: The configuration of the run; it is stored in ``out``.
        out: A JSON file, written after each seed.
        resume: Whether to take finished seeds from ``out``. The ratio of the times of a step is taken from there too,
            because the number of distillation's steps depends on it.
        progress: Whether to show a progress bar.

    Returns:
        The points of each seed.

    Raises:
        DataError: If ``out`` belongs to another configuration.
    """
    earlier = stored.load_record(out, config) if resume else None
    by_seed: dict[str, list[Point]]
    if earlier is None:
        ratio, by_seed = step_ratio(tasks, settings, seed=seeds[0]), {}
    else:
        ratio, by_seed = earlier["step_ratio"], earlier["by_seed"]
    print(f"a step of the path takes {ratio:.2f} times as long as one of distillation", flush=True)
    for seed in seeds:
        if str(seed) not in by_seed:
            by_seed[str(seed)] = points(tasks, settings, ratio=ratio, seed=seed, progress=progress)
            content = {"config": config, "step_ratio": ratio, "by_seed": by_seed}
            record.write(out, "trade_off", torch.device("cpu"), content)
    return [by_seed[str(seed)] for seed in seeds]


def means(runs: Sequence[Sequence[Point]]) -> list[Point]:
    """Returns one point for each setting, averaged over the runs (one for each seed)."""
    averaged = ("seconds", "drift", "task1", "task1_worst", "task2")
    return [
        {**same[0], **{key: statistics.fmean(p[key] for p in same) for key in averaged}}
        for same in zip(*runs, strict=True)
    ]


def front(candidates: Iterable[Point], key: str, *, least: bool) -> list[Point]:
    """Returns the Pareto front: the points that no other beats in both the new task's accuracy and ``key``.

    Args:
        candidates: The points to choose from.
        key: ``"drift"`` or ``"task1_worst"``.
        least: Whether a small value of ``key`` is better than a large one.

    Returns:
        The points of the front by rising accuracy.
    """
    sign = 1 if least else -1
    best: list[Point] = []
    for point in sorted(candidates, key=lambda p: (-p["task2"], sign * p[key])):
        if not best or sign * point[key] < sign * best[-1][key]:
            best.append(point)
    return best[::-1]


def reached(averages: Sequence[Point], accuracy: float, key: str, *, least: bool) -> int | None:
    """Finds the best point that reaches an accuracy on the new task.

    Args:
        averages: The points to choose from.
        accuracy: The accuracy (%) on the new task that the point must reach.
        key: ``"drift"`` or ``"task1_worst"``.
        least: Whether a small value of ``key`` is better than a large one.

    Returns:
        The index of the point; None if no point reaches the accuracy.
    """
    enough = [k for k, p in enumerate(averages) if p["task2"] >= accuracy]
    if not enough:
        return None
    return (min if least else max)(enough, key=lambda k: averages[k][key])


# The rows of the table: accuracies on the new task (%).
LEVELS = (60.0, 70.0, 75.0, 80.0, 82.0, 84.0, 86.0, 88.0)
# The measures of the old task: the label on the axis, and whether the least value is the best.
KINDS = {"drift": ("drift on test inputs", True), "task1_worst": ("worst on the way (%)", False)}


def table(runs: Sequence[Sequence[Point]]) -> str:
    """Returns a text table: for each time and accuracy on the new task, how well each method keeps the old task.

    The columns are the least drift, and the highest accuracy of the worst network along the way. Each cell shows the
    setting with the best mean over the seeds, as mean ± standard deviation. If there are several seeds, a further
    column has the path's value less distillation's: the mean of the paired differences ± its standard error.

    Args:
        runs: The points of each seed.
    """
    paired = len(runs) > 1
    titles = [*(METHODS[m].title for m in GRID), *(["difference"] if paired else [])]
    rows = [["time", "new task", *(f"{t}: {k}" for k in ("drift", "worst") for t in titles)]]
    for steps, level in itertools.product(STEPS, LEVELS):
        cells = []
        for key, (_, least) in KINDS.items():
            form = ".3g" if least else ".2f"
            chosen = [_chosen(runs, m, steps, level, key, least=least) for m in GRID]
            cells += [_cell([p[key] for p in points], form) for points in chosen]
            if paired:
                cells.append(_difference(chosen, key, form))
        if set(cells) != {"–"}:
            rows.append([f"{steps} steps", f"≥ {level:g} %", *cells])
    return report.aligned(rows)


def _chosen(
    runs: Sequence[Sequence[Point]],
    method: str,
    steps: int,
    level: float,
    key: str,
    *,
    least: bool,
) -> list[Point]:
    """Returns the points (one for each seed) of a method's best setting; an empty list if none reaches ``level``."""
    candidates = [
        [p for p in points if (p["method"], p["time"]) == (method, steps)] for points in runs
    ]
    best = reached(means(candidates), level, key, least=least)
    return [] if best is None else [points[best] for points in candidates]


def _cell(values: Sequence[float], form: str) -> str:
    """Returns mean ± standard deviation as text; a dash if there are no values."""
    return report.mean_and_deviation(values, form) if values else "–"


def _difference(chosen: Sequence[Sequence[Point]], key: str, form: str) -> str:
    """Returns the mean paired difference of two methods ± its standard error; a dash if either has no points."""
    if not all(chosen):
        return "–"
    path, other = ([{key: float(p[key])} for p in points] for points in chosen)
    return report.mean_and_error(report.paired(path, other)[key], form)


def draw(path: Path, averages: Sequence[Point]) -> None:
    """Draws all points, and a line through the best points of each method; each length of time has a column."""
    figure, axes = plt.subplots(
        2, len(STEPS), figsize=(3.1 * len(STEPS), 5.6), sharex="col", sharey="row"
    )
    colours = dict(zip(GRID, ("#1f5fa8", "#d9730d"), strict=True))
    for column, steps in enumerate(STEPS):
        for row, (key, (label, least)) in enumerate(KINDS.items()):
            axis = axes[row, column]
            for method, colour in colours.items():
                own = [p for p in averages if p["method"] == method and p["time"] == steps]
                best = front(own, key, least=least)
                axis.plot(*_xy(own, key), ".", color=colour, alpha=0.35, markersize=4)
                axis.plot(*_xy(best, key), "o-", color=colour, label=METHODS[method].title, ms=4)
            if least:
                axis.set_yscale("log")
                axis.set_title(f"time of {steps} steps", fontsize=10)
            else:
                axis.set_xlabel("new task (%)")
            axis.set_ylabel(label if column == 0 else "")
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _xy(chosen: Iterable[Point], key: str) -> tuple[list[float], list[float]]:
    """Returns the new task's accuracy and ``key`` of each point, as two lists."""
    pairs = [(p["task2"], p[key]) for p in chosen]
    return [x for x, _ in pairs], [y for _, y in pairs]


def main() -> None:
    """Runs the benchmark, prints and draws the curve, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--download", action="store_true", help="download missing data")
    parser.add_argument("--seeds", type=SEED, nargs="+", action=Distinct, default=[0])
    parser.add_argument("--anchors", type=whole(1), default=DEFAULTS["mnist"].anchors)
    parser.add_argument("--anchor-batch", type=whole(1), default=ANCHOR_BATCH)
    parser.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=DEFAULTS["mnist"].augment,
        help="make many views of each anchor",
    )
    parser.add_argument(
        "--validation",
        type=fraction,
        default=0.0,
        help="share of the training inputs to test on instead of the test inputs [%(default)g]",
    )
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    parser.add_argument(
        "--resume", action="store_true", help="keep the finished seeds of the file --out"
    )
    parser.add_argument("--out", type=Path, default=record.RESULTS / "trade_off.json")
    arguments = parser.parse_args()
    base = DEFAULTS["mnist"]
    settings = dataclasses.replace(
        base,
        anchors=arguments.anchors,
        anchor_batch=arguments.anchor_batch,
        augment=arguments.augment,
        methods={
            **base.methods,
            "fip": dataclasses.replace(base.methods["fip"], products=PRODUCTS),
        },
    )
    if not settings.augment and arguments.anchor_batch > settings.anchors:
        settings = dataclasses.replace(settings, anchor_batch=None)
    try:
        tasks = load_pair(
            "mnist",
            "fashion-mnist",
            data_root=arguments.data_root,
            download=arguments.download,
        )
    except DataError as error:
        parser.error(str(error))
    if arguments.validation > 0:
        tasks = tasks[0].held_out(arguments.validation), tasks[1].held_out(arguments.validation)
    # Momentum, step lengths, learning rates and strengths come from the grid and not from the settings.
    config = {
        **config_of(settings),
        "validation": arguments.validation,
        "steps": STEPS,
        "momentum": {method: list(values.values()) for method, values in MOMENTUM.items()},
        "grid": GRID,
    }
    try:
        by_seed = seed_by_seed(
            tasks,
            settings,
            arguments.seeds,
            config=config,
            out=arguments.out,
            resume=arguments.resume,
            progress=arguments.progress,
        )
    except DataError as error:
        parser.error(str(error))
    draw(arguments.out.with_suffix(".png"), means(by_seed))
    print(f"seeds {', '.join(map(str, arguments.seeds))}\n{table(by_seed)}", flush=True)


if __name__ == "__main__":
    main()
