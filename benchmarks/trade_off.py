"""What is learnt against what is lost, at equal time: ``python -m benchmarks.trade_off --data-root DIR``.

From one network trained on MNIST, Fashion-MNIST is learnt for a short while along the invariant path and by tuned
distillation, from the same anchors: for as long as the path takes for 10, 30, 100 and 300 steps, over a grid of step
lengths (learning rates) and strengths that has as many points for each. What is printed and drawn is the whole curve:
for each accuracy on the new task the least drift on test inputs of the first, and the highest accuracy of the worst
network on the way.
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

STEPS = (10, 30, 100, 300)  # of the path; distillation takes as many as fit into their time
# Chosen on held-out images for each length; the recipes' are too much for so few steps. Of distillation it is Adam's
# first beta.
MOMENTUM = {
    "fip": {10: 0.5, 30: 0.5, 100: 0.7, 300: 0.7},
    "distillation": {10: 0.5, 30: 0.5, 100: 0.5, 300: 0.5},
}
# The paths' (eps, beta), and distillation's (learning rate, strength).
GRID = {
    "fip": ((1.0, 2.0, 4.0), (20.0, 80.0)),
    "distillation": ((1e-3, 3e-3, 6e-3), (0.005, 0.02)),
}
ON_THE_WAY = (1, 2, 3, 5, 10, 20, 50, 100, 200)  # networks tested, and the last one
# Anchors of a step: with the recipe's 25 the path drifts farther in runs this short.
ANCHOR_BATCH = 50
# Long steps would take products and twice the time; without them they are shortened to the recipe's radius.
PRODUCTS = 0
TIMED_ROUNDS, TIMED_STEPS = 9, 24  # by which the two methods' steps are timed
TESTED, HELD_OUT = 1000, 2000  # test inputs on the way, and those on which drift is measured
Point = dict[str, Any]


def points(
    tasks: tuple[Task, Task], settings: NewTaskSettings, *, ratio: float, seed: int, progress: bool
) -> list[Point]:
    """Every method at every length, rate and strength, from one network.

    Args:
        tasks: The first, and the new one.
        settings: The recipe's; the momentum, step length (learning rate) and weight of both methods are overridden.
        ratio: Seconds of a step of the path over those of a step of distillation.
        seed: Of the weights, batches and anchors.
        progress: Whether to show a bar.
    """
    seed_everything(seed)
    task1, task2 = tasks
    model = network_for("mnist", task1.classes + task2.classes)
    learn_first_task(model, task1, settings, seed=seed, progress=progress)
    kept = draw_remembered(task1, settings.anchors, seed)
    found = []
    todo = [
        (method, steps, rate, strength)
        for steps in STEPS
        for method, grid in GRID.items()
        for rate, strength in itertools.product(*grid)
    ]
    for method, steps, rate, strength in tqdm(todo, desc=f"seed {seed}", disable=not progress):
        taken = steps if method == "fip" else round(steps * ratio)
        net = copy.deepcopy(model)
        momentum = MOMENTUM[method][steps]
        learner = _learner(method, net, task1.name, settings, momentum, rate, strength, seed=seed)
        learner.remember(*kept)
        measured = _Measured(net, task1, taken)
        batches = minibatches(task2, batch_size=settings.batch_size, epochs=1, seed=seed + 1)
        seconds = learner.learn(
            itertools.islice(batches, taken), steps=taken, after_step=measured.after_step
        )
        found.append(
            {
                "method": method,
                "time": steps,
                "steps": taken,
                "momentum": momentum,
                "rate": rate,
                "strength": strength,
                "seconds": seconds,
                "drift": measured.held_out.drift(),
                "task1": accuracy(net, task1.test_inputs, task1.test_labels),
                "task1_worst": measured.worst,
                "task2": accuracy(net, task2.test_inputs, task2.test_labels),
            }
        )
    return found


def _learner(
    method: str,
    model: nn.Module,
    remembered_data: str,
    settings: NewTaskSettings,
    momentum: float,
    rate: float,
    strength: float,
    *,
    seed: int,
) -> Learner:
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
        augment=many(remembered_data, settings.views) if settings.augment else None,
        seed=seed,
        freeze_batch_norm=True,
    )


def step_ratio(tasks: tuple[Task, Task], settings: NewTaskSettings, *, seed: int) -> float:
    """Seconds of a step of the path over those of a step of distillation, timed in turn: the median of the rounds.

    Each round has a ratio of its own, as a machine shared with others may be slower in one round than in the next.
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
    """Of single steps in the middle of the method's grid; the first half, in which traces are made, is left out."""
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
    passed = [b - a for a, b in itertools.pairwise(ends)]
    return passed[len(passed) // 2 :]


class _Measured:
    """The worst network on the way, on some test inputs of the first task."""

    def __init__(self, model: nn.Module, task: Task, steps: int) -> None:
        self.model, self.task, self.steps = model, task, steps
        self.held_out = AnchorBatch(model, task.test_inputs[:HELD_OUT])
        self.worst = 100.0

    def after_step(self, step: int) -> None:
        if step in ON_THE_WAY or step == self.steps:
            x, y = self.task.test_inputs[:TESTED], self.task.test_labels[:TESTED]
            self.worst = min(self.worst, accuracy(self.model, x, y, batch_size=500))


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
    """The points of each seed; ``out`` has those that are done.

    Args:
        tasks: The first, and the new one.
        settings: See :func:`points`.
        seeds: In this order.
        config: What tells one run from another.
        out: A JSON file, written after each seed.
        resume: Whether seeds that ``out`` has are taken from there; so is the ratio of the steps' times, on which the
            number of distillation's steps depends.
        progress: Whether to show a bar.

    Raises:
        DataError: If ``out`` is of another configuration.
    """
    found = stored.load_record(out, config) if resume else None
    if found is None:
        found = {"config": config, "by_seed": {}}
        found["step_ratio"] = step_ratio(tasks, settings, seed=seeds[0])
    ratio, by_seed = found["step_ratio"], found["by_seed"]
    print(f"a step of the path takes {ratio:.2f} times one of distillation", flush=True)
    for seed in seeds:
        if str(seed) not in by_seed:
            by_seed[str(seed)] = points(tasks, settings, ratio=ratio, seed=seed, progress=progress)
            content = {"config": config, "step_ratio": ratio, "by_seed": by_seed}
            record.write(out, "trade_off", torch.device("cpu"), content)
    return [by_seed[str(seed)] for seed in seeds]


def means(runs: Sequence[Sequence[Point]]) -> list[Point]:
    """The points of all seeds, averaged setting by setting."""
    averaged = ("seconds", "drift", "task1", "task1_worst", "task2")
    return [
        {**same[0], **{key: statistics.fmean(p[key] for p in same) for key in averaged}}
        for same in zip(*runs, strict=True)
    ]


def front(found: Iterable[Point], key: str, *, least: bool) -> list[Point]:
    """The points that no other beats in both the new task's accuracy and ``key``, by rising accuracy."""
    sign = 1 if least else -1
    kept: list[Point] = []
    for point in sorted(found, key=lambda p: (-p["task2"], sign * p[key])):
        if not kept or sign * point[key] < sign * kept[-1][key]:
            kept.append(point)
    return kept[::-1]


def reached(averages: Sequence[Point], accuracy: float, key: str, *, least: bool) -> int | None:
    """Which of the points that learnt the new task at least to ``accuracy`` has the best ``key``."""
    enough = [k for k, p in enumerate(averages) if p["task2"] >= accuracy]
    if not enough:
        return None
    return (min if least else max)(enough, key=lambda k: averages[k][key])


LEVELS = (
    60.0,
    70.0,
    75.0,
    80.0,
    82.0,
    84.0,
    86.0,
    88.0,
)  # of the new task, that the table asks for
KINDS = {"drift": ("drift on test inputs", True), "task1_worst": ("worst on the way (%)", False)}


def table(runs: Sequence[Sequence[Point]]) -> str:
    """For each time and accuracy on the new task, the least drift and the best worst network of each method.

    A setting is chosen by its means over the seeds and printed as mean ± standard deviation; of several seeds also what
    the path has less what distillation has, as the mean of the paired differences ± its standard error.

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
    """The points, one a seed, of a method's best setting that reaches ``level``; none if there is none."""
    its = [[p for p in points if (p["method"], p["time"]) == (method, steps)] for points in runs]
    best = reached(means(its), level, key, least=least)
    return [] if best is None else [points[best] for points in its]


def _cell(values: Sequence[float], form: str) -> str:
    return report.mean_and_deviation(values, form) if values else "–"


def _difference(chosen: Sequence[Sequence[Point]], key: str, form: str) -> str:
    """Of the points of two methods, one a seed; there may be none."""
    if not all(chosen):
        return "–"
    path, other = ([{key: float(p[key])} for p in points] for points in chosen)
    return report.mean_and_error(report.paired(path, other)[key], form)


def draw(path: Path, averages: Sequence[Point]) -> None:
    """One column a length of time; all points, and the best of each method joined."""
    figure, axes = plt.subplots(
        2, len(STEPS), figsize=(3.1 * len(STEPS), 5.6), sharex="col", sharey="row"
    )
    colours = dict(zip(GRID, ("#1f5fa8", "#d9730d"), strict=True))
    for column, steps in enumerate(STEPS):
        for row, (key, (label, least)) in enumerate(KINDS.items()):
            axis = axes[row, column]
            for method, colour in colours.items():
                of = [p for p in averages if p["method"] == method and p["time"] == steps]
                best = front(of, key, least=least)
                axis.plot(*_xy(of, key), ".", color=colour, alpha=0.35, markersize=4)
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


def _xy(found: Iterable[Point], key: str) -> tuple[list[float], list[float]]:
    pairs = [(p["task2"], p[key]) for p in found]
    return [x for x, _ in pairs], [y for _, y in pairs]


def main() -> None:
    """Run, print the curve, draw it, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--download", action="store_true", help="fetch what is missing")
    parser.add_argument("--seeds", type=SEED, nargs="+", action=Distinct, default=[0])
    parser.add_argument("--anchors", type=whole(1), default=DEFAULTS["mnist"].anchors)
    parser.add_argument("--anchor-batch", type=whole(1), default=ANCHOR_BATCH)
    parser.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=DEFAULTS["mnist"].augment,
        help="make the anchors many",
    )
    parser.add_argument("--validation", type=fraction, default=0.0, help="part held out to test on")
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    parser.add_argument("--resume", action="store_true", help="keep the seeds that --out has")
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
    # Momentum, lengths of step and learning rates are the grid's.
    config = {
        **config_of(settings),
        "validation": arguments.validation,
        "steps": STEPS,
        "momentum": {method: list(of.values()) for method, of in MOMENTUM.items()},
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
