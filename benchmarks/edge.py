"""What a step at the edge of a budget costs: ``python -m benchmarks.edge --data-root DIR``.

A CNN that knows MNIST learns Fashion-MNIST with ``max_drift`` at every step, and in turn a copy of it by distillation.
Both see all anchors at each step. The budget is so small that nearly every step meets it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import record
from fipoptim import AnchorBatch, FIPOptimizer, Solver, StepInfo
from fipoptim.anchors import squared_distance
from recipes.common.data import DataError, Task, load_pair
from recipes.common.networks import network_for, path_groups
from recipes.common.options import COUNT, SEED
from recipes.common.training import (
    minibatches,
    seed_everything,
    steps_an_epoch,
    training_mode,
)
from recipes.continual.remembered import draw_remembered
from recipes.new_task.learning import learn_first_task
from recipes.new_task.settings import DEFAULTS

ANCHORS = 500
MAX_DRIFT = 3.0
BETA, EPS, STRENGTH, RATE = 60.0, 0.5, 0.015, 1e-3
FIRST = 3  # steps that are not counted: they prepare what later ones reuse


def seconds(step: Callable[[Tensor, Tensor], None], x: Tensor, y: Tensor) -> float:
    """The CPU time of one step."""
    began = time.process_time()
    step(x, y)
    return time.process_time() - began


def budgeted(model: nn.Module, inputs: Tensor, check: Tensor | None) -> tuple[FIPOptimizer, Any]:
    """An optimizer whose budget holds at every step, and a function that takes a step with it."""
    anchors = AnchorBatch(model, inputs, check=check)
    optimizer = FIPOptimizer(
        path_groups(model),
        anchors,
        beta=BETA,
        eps=EPS,
        momentum=0.9,
        precondition="muon",
        max_drift=MAX_DRIFT,
        solver=Solver(radius=10.0),
    )

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return optimizer, step


def distilling(model: nn.Module, inputs: Tensor) -> Callable[[Tensor, Tensor], None]:
    """A function that takes a step of distillation on all anchors."""
    reference = model(inputs).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        drift = squared_distance(model(inputs), reference).mean()
        (F.cross_entropy(model(x), y) + STRENGTH * drift).backward()
        optimizer.step()

    return step


def measure(
    start: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    inputs: Tensor,
    check: Tensor | None,
) -> dict[str, Any]:
    """The time of budgeted steps in steps of distillation, in turn.

    Returns:
        ``ratio``, the median over the steps at the edge; how many ``steps`` and how many ``at_the_edge``; the
        ``products`` of all; the mean ``drift`` after a step; ``step``, the median length of a step.
    """
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    for model in (ours, theirs):
        training_mode(model, freeze_batch_norm=True)
    optimizer, step = budgeted(ours, inputs, check)
    other = distilling(theirs, inputs)
    ratios, infos = list[float](), list[StepInfo]()
    for x, y in batches:
        ratios.append(seconds(step, x, y) / seconds(other, x, y))
        assert optimizer.last_step is not None
        infos.append(optimizer.last_step)
    edge = [r for r, info in zip(ratios, infos, strict=True) if info.backtracks][FIRST:]
    return {
        "ratio": statistics.median(edge) if edge else None,
        "steps": len(ratios),
        "at_the_edge": sum(info.backtracks > 0 for info in infos),
        "products": sum(info.iterations for info in infos),
        "drift": statistics.fmean(info.drift for info in infos[FIRST:]),
        "step": statistics.median(info.step_norm for info in infos[FIRST:]),
    }


def prepared(tasks: tuple[Task, Task], seed: int) -> tuple[nn.Module, Tensor]:
    """The network that knows the first task, and inputs of it: anchors, and as many check inputs after them."""
    seed_everything(seed)
    start = network_for("mnist", tasks[0].classes + tasks[1].classes)
    learn_first_task(start, tasks[0], DEFAULTS["mnist"], seed=seed, progress=False)
    return start, draw_remembered(tasks[0], 2 * ANCHORS, seed)[0]


def main() -> None:
    """Runs the benchmark, prints the figures, and writes the JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.edge", description="What a step at the edge of a budget costs."
    )
    parser.add_argument("--data-root", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--steps", **COUNT, default=40)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "edge.json", metavar="FILE")
    arguments = parser.parse_args()
    try:
        tasks = load_pair("mnist", "fashion-mnist", data_root=arguments.data_root)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    torch.set_num_threads(1)
    start, inputs = prepared(tasks, arguments.seed)
    found = {}
    for name, check in (("on the anchors", None), ("on check inputs", inputs[ANCHORS:])):
        epochs = arguments.steps / steps_an_epoch(tasks[1], 100)
        batches = minibatches(tasks[1], batch_size=100, epochs=epochs, seed=arguments.seed + 1)
        found[name] = measure(start, batches, inputs[:ANCHORS], check)
        print(f"budget {name}: {found[name]}", flush=True)
    config = {"anchors": ANCHORS, "max_drift": MAX_DRIFT, "beta": BETA, "eps": EPS}
    content = {"config": config, "seed": arguments.seed, "found": found}
    record.write(arguments.out, "edge", torch.device("cpu"), content)


if __name__ == "__main__":
    main()
