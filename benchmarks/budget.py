"""What is learnt within a budget of drift: ``python -m benchmarks.budget --data-root DIR --seeds 0 1 2``.

A network that has learnt one task learns another, and its outputs on the first may move by a budget. One run of
``FIPOptimizer`` with ``beta="auto"`` and :meth:`settle` is told the budget. Beside it stand the best of twelve
distillation runs, each of which takes as long, and the best network on the straight line from the start to plain
training (WiSE-FT; Wortsman et al., 2022). Neither can be told a budget: they are chosen by the drift on the test images
themselves, which favours them.

Times are CPU times. The paths and one distillation run take turns step by step on the same batches, so that a slow
phase of the machine slows all of them.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from benchmarks import record
from benchmarks.restore import interpolated
from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.anchors.measured import measured
from recipes.common import report, stored
from recipes.common.augment import Augment, augmentation
from recipes.common.data import DataError, Task, load_pair
from recipes.common.networks import network_for, path_groups
from recipes.common.options import SEED, Distinct
from recipes.common.training import (
    accuracy,
    adam_one_cycle,
    minibatches,
    outputs,
    seed_everything,
    steps_an_epoch,
    train,
)
from recipes.continual.methods import make_learner
from recipes.continual.methods.plain import Plain
from recipes.continual.methods.schedules import SCHEDULES
from recipes.continual.remembered import draw_remembered
from recipes.new_task.learning import learn_first_task
from recipes.new_task.settings import DEFAULTS, NewTaskSettings

Point = dict[str, Any]
Step = Callable[[Tensor, Tensor], float]

# The path gets this share of distillation's time; the rest is for settle().
SHARE_OF_PATH = 0.9
SHARES = tuple(k / 40 for k in range(41))  # of the way from the start to plain training
BEYOND = 4.0  # the line ends where the drift is beyond the largest budget by this factor
UNSEEN = 2000  # test inputs of the old task


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pair of tasks, and how the second is learnt.

    Attributes:
        tasks: The names of the data sets.
        family: The key of the network and of the recipe's settings.
        budgets: The largest drifts.
        anchors: Inputs whose outputs are held.
        check: Further inputs, on which the budget counts.
        path: Options of ``FIPOptimizer``.
        steps: Steps of distillation. The path takes as many as fit into the same time.
        timed: The time of a step is compared over so many steps of each before.
        strengths: The strengths of distillation.
        rates: Adam's rates for distillation.
        lengths: Factors of ``eps`` that are run beside it, for the first seed.
        within: The budget of these runs.
    """

    tasks: tuple[str, str]
    family: str
    budgets: tuple[float, ...]
    anchors: int
    check: int
    path: dict[str, Any]
    steps: int
    timed: int
    strengths: tuple[float, ...]
    rates: tuple[float, ...]
    lengths: tuple[float, ...]
    within: float

    @property
    def settings(self) -> NewTaskSettings:
        """The settings of the recipe, with the anchors of this case."""
        return dataclasses.replace(DEFAULTS[self.family], anchors=self.anchors)

    @property
    def augment(self) -> Augment | None:
        """The views of the anchors that each step sees."""
        return augmentation(self.tasks[0]) if self.settings.augment else None


CASES = {
    "digits": Case(
        tasks=("digits-low", "digits-high"),
        family="digits",
        budgets=(10.0, 20.0, 30.0, 50.0),
        anchors=150,
        check=50,
        path={"eps": 0.8, "precondition": "adam", "solver": Solver(max_products=8)},
        steps=2000,
        timed=200,
        strengths=(0.03, 0.1, 0.3, 1.0),
        rates=(3e-3, 1e-2, 2e-2),
        lengths=(0.5, 2.0),
        within=20.0,
    ),
    "mnist": Case(
        tasks=("mnist", "fashion-mnist"),
        family="mnist",
        budgets=(2.5, 5.0, 10.0, 20.0),
        anchors=500,
        check=500,
        path={
            "eps": 0.5,
            "momentum": 0.9,
            "precondition": "muon",
            "solver": Solver(products=0),
        },
        steps=450,
        timed=30,
        strengths=(0.001, 0.003, 0.015, 0.05),
        rates=(1e-3, 2e-3, 4e-3),
        lengths=(0.5, 2.0),
        within=5.0,
    ),
}


class Measuring:
    """Measures networks against the start.

    Args:
        start: The network that has learnt the old task.
        tasks: The old task, and the new one.
    """

    def __init__(self, start: nn.Module, tasks: tuple[Task, Task]) -> None:
        old, self._new = tasks
        self._unseen = old.test_inputs[:UNSEEN]
        self._reference = outputs(start, self._unseen)

    def moved(self, network: nn.Module) -> Point:
        """``drift`` and ``flips`` on inputs of the old task that were not seen."""
        z = outputs(network, self._unseen)
        found = measured(z, self._reference, self._reference.shape[1:])
        return {"drift": rounded(found.drift), "flips": rounded(found.flips)}

    def point(self, network: nn.Module) -> Point:
        """``new``, the accuracy on the new task in percent, beside :meth:`moved`."""
        new = accuracy(network, self._new.test_inputs, self._new.test_labels)
        return {"new": rounded(new), **self.moved(network)}


def rounded(value: float) -> float:
    """A value to four significant digits, which is what the file keeps."""
    return float(f"{value:.4g}")


class Walk:
    """A path that is told a budget and nothing else.

    Args:
        start: The network before; it stays as it is.
        inputs: The anchors, and after them the check inputs.
        case: The case.
        budget: The budget.
        steps: Steps of the whole path.
        seed: The seed of the anchors' draws.
        factor: Multiplies ``eps``.

    Attributes:
        model: The network on the path.
        optimizer: The optimizer that moves it.
        step: Takes one step and returns its CPU time.
    """

    def __init__(
        self,
        start: nn.Module,
        inputs: Tensor,
        case: Case,
        budget: float,
        *,
        steps: int,
        seed: int,
        factor: float = 1.0,
    ) -> None:
        self.model = copy.deepcopy(start)
        self.anchors = AnchorBatch(
            self.model,
            inputs[: case.anchors],
            check=inputs[case.anchors :],
            batch_size=case.settings.anchors_drawn,
            augment=case.augment,
            generator=torch.Generator().manual_seed(seed),
        )
        options = {**case.path, "eps": factor * case.path["eps"]}
        self.optimizer = FIPOptimizer(
            path_groups(self.model),
            self.anchors,
            beta="auto",
            max_drift=budget,
            check_every=None,
            **options,
        )
        scheduler = SCHEDULES["one-cycle"](self.optimizer, options["eps"], steps)
        self.step = stepper(self.model, self.optimizer, scheduler)

    def settled(self, measuring: Measuring) -> Point:
        """Settle, and measure the network that is left, and the one before."""
        unsettled = measuring.point(self.model)
        began = time.process_time()
        found = self.optimizer.settle()
        seconds = time.process_time() - began
        return {
            "budget": self.optimizer.max_drift,
            **measuring.point(self.model),
            "check_drift": rounded(found.after.drift),
            "check_drift_before": rounded(found.before.drift),
            "new_before": unsettled["new"],
            "within": found.within,
            "went_back": found.went_back,
            "products": found.products,
            "settle_seconds": rounded(seconds),
        }


def stepper(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Step:
    """A function that trains a model for one step and returns the CPU time of that."""

    def step(x: Tensor, y: Tensor) -> float:
        began = time.process_time()
        train(model, iter([(x, y)]), optimizer, scheduler, loss=loss, freeze_batch_norm=True)
        return time.process_time() - began

    return step


def distilling(
    model: nn.Module,
    remembered: tuple[Tensor, Tensor],
    case: Case,
    strength: float,
    rate: float,
    *,
    seed: int,
) -> Step:
    """A step of distillation, which trains ``model`` in place and sees the anchors that the path sees."""
    options = dataclasses.replace(case.settings.methods["distillation"], strength=strength, lr=rate)
    methods = {**case.settings.methods, "distillation": options}
    learner = make_learner(
        "distillation",
        model,
        dataclasses.replace(case.settings, methods=methods),
        augment=case.augment,
        seed=seed,
        freeze_batch_norm=True,
    )
    assert isinstance(learner, Plain)
    x, y = remembered
    learner.remember(x[: case.anchors], y[: case.anchors])
    return stepper(model, *learner.optimizer(case.steps), learner.objective())


def measure(
    tasks: tuple[Task, Task], case: Case, *, seed: int, lengths: bool, progress: bool
) -> dict[str, Any]:
    """Measures one seed.

    Args:
        tasks: The old task, and the new one.
        case: How the second is learnt.
        seed: The seed of weights, batches and anchors.
        lengths: Whether other lengths of a step are run, too.
        progress: Whether to show progress bars.

    Returns:
        ``ours``, one point for each budget, ``sweep``, one for each run of distillation, ``line``, ``lengths``, and the
        times.
    """
    settings = case.settings
    seed_everything(seed)
    start = network_for(case.family, sum(t.classes for t in tasks))
    learn_first_task(start, tasks[0], settings, seed=seed, progress=progress)
    measuring = Measuring(start, tasks)
    remembered = draw_remembered(tasks[0], case.anchors + case.check, seed)
    grid = list(itertools.product(case.strengths, case.rates))
    middle = grid[len(grid) // 2]

    def batches(steps: int) -> Any:
        epochs = steps / steps_an_epoch(tasks[1], settings.batch_size)
        return minibatches(tasks[1], batch_size=settings.batch_size, epochs=epochs, seed=seed + 1)

    # How long a step takes, on copies, over the whole course of a short cycle.
    walk = Walk(start, remembered[0], case, case.within, steps=case.timed, seed=seed)
    other = distilling(copy.deepcopy(start), remembered, case, *middle, seed=seed)
    both = [(walk.step(x, y), other(x, y)) for x, y in batches(case.timed)]
    ratio = sum(a for a, _ in both) / sum(b for _, b in both)
    steps = max(1, int(SHARE_OF_PATH * case.steps / ratio))

    walks = [Walk(start, remembered[0], case, b, steps=steps, seed=seed) for b in case.budgets]
    beside = copy.deepcopy(start)
    other = distilling(beside, remembered, case, *middle, seed=seed)
    took = [0.0 for _ in walks]
    other_seconds = list[float]()
    for x, y in tqdm(batches(case.steps), total=case.steps, desc="in turn", disable=not progress):
        other_seconds.append(other(x, y))
        if len(other_seconds) <= steps:
            took = [t + walk.step(x, y) for t, walk in zip(took, walks, strict=True)]
    ours = []
    for walk, of_path in zip(walks, took, strict=True):
        point = walk.settled(measuring)
        seconds = of_path + point["settle_seconds"]
        point["seconds"] = rounded(seconds)
        point["of_distillation"] = rounded(seconds / sum(other_seconds))
        point["of_as_many_steps"] = rounded(seconds / sum(other_seconds[:steps]))
        ours.append(point)

    sweep = []
    for strength, rate in tqdm(grid, desc="sweep", disable=not progress):
        if (strength, rate) == middle:
            network, seconds = beside, sum(other_seconds)
        else:
            network = copy.deepcopy(start)
            step = distilling(network, remembered, case, strength, rate, seed=seed)
            seconds = sum(step(x, y) for x, y in batches(case.steps))
        of_run = {"strength": strength, "rate": rate, "seconds": rounded(seconds)}
        sweep.append({**of_run, **measuring.point(network)})

    plain = copy.deepcopy(start)
    lr = settings.methods["naive"].lr
    step = stepper(plain, *adam_one_cycle(plain, lr=lr, steps=case.steps))
    line_seconds = sum(step(x, y) for x, y in batches(case.steps))
    line = []
    for share in SHARES:
        between = interpolated(start, plain, share)
        line.append({"share": share, **measuring.point(between)})
        if line[-1]["drift"] > BEYOND * max(case.budgets):
            break

    found: dict[str, Any] = {
        "steps": steps,
        "ratio_of_a_step": rounded(ratio),
        "beta": rounded(walks[0].optimizer.param_groups[0]["beta"]),
        "plain": measuring.point(plain),
        "ours": ours,
        "sweep": sweep,
        "sweep_seconds": rounded(sum(p["seconds"] for p in sweep)),
        "line": line,
        "line_seconds": rounded(line_seconds),
    }
    if lengths:
        found["lengths"] = []
        for factor in case.lengths:
            walk = Walk(
                start, remembered[0], case, case.within, steps=steps, seed=seed, factor=factor
            )
            for x, y in batches(steps):
                walk.step(x, y)
            found["lengths"].append({"eps": factor * case.path["eps"], **walk.settled(measuring)})
    return found


def best_within(points: Sequence[Point], budget: float) -> float | None:
    """The highest accuracy on the new task among the points whose drift on unseen inputs is within a budget."""
    return max((p["new"] for p in points if p["drift"] <= budget), default=None)


def table(by_seed: dict[str, Any]) -> str:
    """What is learnt within each budget, as mean ± standard deviation over the seeds; a dash if a seed has nothing."""
    rows = [
        [
            "budget",
            "ours: new",
            "drift",
            "flips (%)",
            "check drift",
            "seconds",
            "of its time",
            "of as many steps",
            "best of sweep",
            "best of line",
        ]
    ]

    def cell(values: Sequence[float | None], form: str = ".2f") -> str:
        there = [v for v in values if v is not None]
        if len(there) < len(values):
            return "–"
        return report.mean_and_deviation(there, form) if len(there) > 1 else f"{there[0]:{form}}"

    seeds = list(by_seed.values())
    for of_budget in zip(*(found["ours"] for found in seeds), strict=True):
        budget = of_budget[0]["budget"]
        rows.append(
            [
                f"{budget:g}",
                cell([p["new"] for p in of_budget]),
                cell([p["drift"] for p in of_budget]),
                cell([100 * p["flips"] for p in of_budget]),
                cell([p["check_drift"] for p in of_budget]),
                cell([p["seconds"] for p in of_budget], ".1f"),
                cell([p["of_distillation"] for p in of_budget]),
                cell([p["of_as_many_steps"] for p in of_budget]),
                cell([best_within(found["sweep"], budget) for found in seeds]),
                cell([best_within(found["line"], budget) for found in seeds]),
            ]
        )
    lines = [report.aligned(rows)]
    lines += [
        f"seed {seed}: {found['steps']} steps, beta {found['beta']:g}; a step {found['ratio_of_a_step']:.2f} times one "
        f"of distillation; sweep {found['sweep_seconds']:.0f} s, line {found['line_seconds']:.0f} s; before settle() "
        + ", ".join(
            f"{p['new_before']:.2f} at a drift of {p['check_drift_before']:.2f}"
            for p in found["ours"]
        )
        for seed, found in by_seed.items()
    ]
    lines += [
        f"seed {seed}: drift / budget on unseen inputs (on the check inputs): "
        + ", ".join(
            f"{p['drift'] / p['budget']:.2f} ({p['check_drift'] / p['budget']:.2f})"
            for p in found["ours"]
        )
        for seed, found in by_seed.items()
    ]
    lines += [
        f"seed {seed}: eps {p['eps']:g}, budget {p['budget']:g}: {p['new']:.2f}, drift {p['drift']:.2f}, on the check "
        f"inputs {p['check_drift']:.2f}"
        for seed, found in by_seed.items()
        for p in found.get("lengths", [])
    ]
    return "\n".join(lines)


def draw(path: Path, case: Case, by_seed: dict[str, Any]) -> None:
    """Draws drift on unseen inputs and accuracy on the new task of all networks."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for number, found in enumerate(by_seed.values()):
        named = number == 0
        for key, style, colour, label in (
            ("line", "-", "#999999", "line to plain training"),
            ("sweep", "o", "#d9730d", "distillation, 12 runs"),
            ("ours", "D-", "#1f5fa8", "one budgeted path"),
        ):
            xy = [(p["drift"], p["new"]) for p in found[key] if p["drift"] > 0]
            axis.plot(
                *zip(*xy, strict=True), style, color=colour, ms=5, label=label if named else None
            )
    for budget in case.budgets:
        axis.axvline(budget, color="#cccccc", linewidth=0.8, zorder=0)
    axis.set_xscale("log")
    axis.set_xlim(min(case.budgets) / 4, BEYOND * max(case.budgets))
    axis.set_xlabel("drift on unseen test images of the old task (budgets: grey)")
    axis.set_ylabel("accuracy on the new task (%)")
    axis.legend(frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def config_of(case: Case) -> dict[str, Any]:
    """The configuration of a case as it is stored."""
    config = dataclasses.asdict(case)
    return {**config, "path": {key: str(value) for key, value in case.path.items()}}


def main() -> None:
    """Runs the benchmark for each case and seed, prints the figures, and writes the JSON file and the plot."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.budget",
        description="What is learnt within a budget of drift, beside a sweep of distillation.",
    )
    parser.add_argument("--data-root", type=Path, required=True, metavar="DIR")
    parser.add_argument("--download", action="store_true", help="fetch data that is not there")
    parser.add_argument("--seeds", type=SEED, nargs="+", action=Distinct, default=[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    parser.add_argument(
        "--resume", action="store_true", help="keep the finished seeds of the file --out"
    )
    parser.add_argument("--out", type=Path, default=record.RESULTS / "budget.json", metavar="FILE")
    arguments = parser.parse_args()
    config = {name: config_of(CASES[name]) for name in arguments.cases}
    found: dict[str, dict[str, Any]] = {name: {} for name in arguments.cases}
    try:
        earlier = stored.load_record(arguments.out, config) if arguments.resume else None
        if earlier is not None:
            found = earlier["found"]
        for name in arguments.cases:
            case, by_seed = CASES[name], found[name]
            tasks = load_pair(
                *case.tasks, data_root=arguments.data_root, download=arguments.download
            )
            for seed in arguments.seeds:
                if str(seed) not in by_seed:
                    by_seed[str(seed)] = measure(
                        tasks,
                        case,
                        seed=seed,
                        lengths=seed == arguments.seeds[0],
                        progress=arguments.progress,
                    )
                    content = {"config": config, "found": found}
                    record.write(arguments.out, "budget", torch.device("cpu"), content)
            print(f"{name}\n{table(by_seed)}", flush=True)
            if name == arguments.cases[-1]:
                draw(arguments.out.with_suffix(".png"), case, by_seed)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
