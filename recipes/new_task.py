"""Teach a trained network a second task while it keeps the first: ``python -m recipes.new_task --help``.

A network learns task 1. Then it learns task 2 twice, from the same weights, on the same batches and for the same
number of steps: along a functionally invariant path, anchored on a few training inputs of task 1, and by plain
training. Networks on both ways are tested on both tasks.

Left in ``--out``: ``results.json`` (configuration, environment, metrics), ``path.csv`` (every network tested) and
``path.png`` (both accuracies and the drift along the way).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from tqdm import tqdm

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from recipes import report
from recipes.data import DATASETS, DataError, Task, check_pair, load_pair
from recipes.networks import network_for
from recipes.options import (
    add_data_options,
    add_run_options,
    fraction,
    or_none,
    positive,
    products,
    usable_device,
    whole,
)
from recipes.report import Curve, Outcome
from recipes.training import (
    accuracy,
    adam_one_cycle,
    minibatches,
    seed_everything,
    steps_an_epoch,
    train,
)

RECIPE = "new_task"
PROGRAM = f"python -m recipes.{RECIPE}"
EARLY_STEPS = (0, 1, 2, 3, 5, 10, 20)  # where a switch of task does its damage
TESTED_EVENLY = 30  # networks on the way that are tested beside these
HELD_OUT = 2000  # test inputs of task 1 on which drift is measured as well


@dataclass(frozen=True)
class Settings:
    """What may be tuned; every field is an option of the command line."""

    anchors: int
    anchor_batch: int | None
    task1_epochs: int
    epochs: int
    batch_size: int
    beta: float
    eps: float
    max_products: int
    task1_lr: float = 3e-3
    naive_lr: float = 3e-3
    schedule: str = "one-cycle"
    momentum: float = 0.0
    precondition: str | None = "adam"
    output_space: str = "logits"
    products: str | int = "adaptive"
    radius: float | None = None
    max_drift: float | None = None

    def solver(self) -> Solver:
        """How Eq. 4 is solved.

        Raises:
            ValueError: If the settings of the solver do not go together.
        """
        return Solver(products=self.products, max_products=self.max_products, radius=self.radius)


# The defaults in which the families of data sets in recipes.data.DATASETS differ.
DEFAULTS = {
    "digits": Settings(
        anchors=200,
        anchor_batch=None,
        task1_epochs=20,
        epochs=20,
        batch_size=32,
        beta=10.0,
        eps=0.8,
        max_products=8,
    ),
    "mnist": Settings(
        anchors=500,
        anchor_batch=50,
        task1_epochs=2,
        epochs=2,
        batch_size=100,
        beta=500.0,
        eps=1.0,
        max_products=16,
    ),
}


def run(
    task1: Task,
    task2: Task,
    settings: Settings,
    *,
    seed: int,
    device: torch.device,
    progress: bool = True,
    networks: Path | None = None,
) -> dict[str, Outcome]:
    """Trains on task 1, then on task 2 along a functionally invariant path and plainly.

    Args:
        task1: What the network learns first and is to keep.
        task2: What it learns then.
        settings: How.
        seed: Of the weights, the batches and the choice of anchors.
        device: Where.
        progress: Whether to show progress bars.
        networks: A folder for the networks along the invariant path, to be read with ``FIPPath.open``.

    Returns:
        The outcome of each under its name, ``"fip"`` and ``"naive"``.
    """
    seed_everything(seed)
    task1, task2 = task1.to(device), task2.to(device)
    model = network_for(DATASETS[task1.name].family, task1.classes + task2.classes).to(device)
    _learn_first_task(model, task1, settings, seed=seed, progress=progress)
    chosen = torch.randperm(len(task1.train_inputs), generator=torch.Generator().manual_seed(seed))[
        : settings.anchors
    ]
    anchor_inputs = task1.train_inputs[chosen.to(device)]

    def learn(name: str, move: MoveFactory, networks: Path | None = None) -> Outcome:
        return _learn_second_task(
            copy.deepcopy(model),
            task1,
            task2,
            anchor_inputs,
            move,
            settings,
            label=f"{task2.name}, {name}",
            seed=seed,
            progress=progress,
            networks=networks,
        )

    return {
        "fip": learn("invariant path", functionally_invariant, networks),
        "naive": learn("plain training", plain),
    }


# How a network is moved on task 2: an optimizer over its parameters, and the schedule of its step length.
MoveFactory = Callable[
    [nn.Module, Tensor, Settings, int, int], tuple[torch.optim.Optimizer, LRScheduler]
]


def functionally_invariant(
    model: nn.Module, anchor_inputs: Tensor, settings: Settings, steps: int, seed: int
) -> tuple[FIPOptimizer, LRScheduler]:
    """The optimizer that holds the model's outputs on ``anchor_inputs``."""
    generator = torch.Generator().manual_seed(seed)
    anchors = AnchorBatch(
        model,
        anchor_inputs,
        output=settings.output_space,
        batch_size=settings.anchor_batch,
        generator=generator,
    )
    optimizer = FIPOptimizer(
        model.parameters(),
        anchors,
        beta=settings.beta,
        eps=settings.eps,
        momentum=settings.momentum,
        precondition=settings.precondition,
        max_drift=settings.max_drift,
        solver=settings.solver(),
        generator=generator,
    )
    return optimizer, SCHEDULES[settings.schedule](optimizer, settings.eps, steps)


def plain(
    model: nn.Module, anchor_inputs: Tensor, settings: Settings, steps: int, seed: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Adam on one cycle, which knows nothing of the anchors."""
    return adam_one_cycle(model, lr=settings.naive_lr, steps=steps)


# One more step than is taken: the last one would have length 0.
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, float, int], LRScheduler]] = {
    "one-cycle": lambda optimizer, lr, steps: OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps + 1, cycle_momentum=False
    ),
    "cosine": lambda optimizer, lr, steps: CosineAnnealingLR(optimizer, T_max=steps + 1),
    "constant": lambda optimizer, lr, steps: LambdaLR(optimizer, lambda step: 1.0),
}


def spacing(steps: int) -> int:
    """Networks on the way are recorded and tested each time this many steps are taken."""
    return max(1, round(steps / TESTED_EVENLY))


def tested_steps(steps: int) -> list[int]:
    """The networks tested, by the step that made them: the recorded ones, and the first ones more densely."""
    early = {step for step in EARLY_STEPS if step <= steps}
    return sorted(early | {*range(0, steps, spacing(steps)), steps})


def _learn_first_task(
    model: nn.Module, task: Task, settings: Settings, *, seed: int, progress: bool
) -> None:
    steps = settings.task1_epochs * steps_an_epoch(task, settings.batch_size)
    optimizer, scheduler = adam_one_cycle(model, lr=settings.task1_lr, steps=steps)
    with tqdm(total=steps, desc=task.name, unit="step", disable=not progress) as bar:
        train(
            model,
            minibatches(
                task, batch_size=settings.batch_size, epochs=settings.task1_epochs, seed=seed
            ),
            optimizer,
            scheduler,
            after_step=lambda step: bar.update(step - bar.n),
        )


def _learn_second_task(
    model: nn.Module,
    task1: Task,
    task2: Task,
    anchor_inputs: Tensor,
    move: MoveFactory,
    settings: Settings,
    *,
    label: str,
    seed: int,
    progress: bool,
    networks: Path | None,
) -> Outcome:
    # Only measure, never move: the same outputs before and after for both ways of training.
    anchors = AnchorBatch(model, anchor_inputs, output=settings.output_space)
    held_out = AnchorBatch(model, task1.test_inputs[:HELD_OUT], output=settings.output_space)
    steps = settings.epochs * steps_an_epoch(task2, settings.batch_size)
    start = time.perf_counter()
    optimizer, scheduler = move(model, anchor_inputs, settings, steps, seed)
    seconds = time.perf_counter() - start
    recording = (
        optimizer.record(every=spacing(steps), folder=networks)
        if networks is not None and isinstance(optimizer, FIPOptimizer)
        else contextlib.nullcontext()
    )
    curve = Curve()
    wanted = set(tested_steps(steps))

    with recording, tqdm(total=steps, desc=label, unit="step", disable=not progress) as bar:

        def test(step: int) -> None:
            if step in wanted:
                task1_now = accuracy(model, task1.test_inputs, task1.test_labels)
                task2_now = accuracy(model, task2.test_inputs, task2.test_labels)
                drift = float(anchors.drift())
                curve.add(step, task1_now, task2_now, drift)
                bar.set_postfix_str(
                    f"{task1.name} {task1_now:.1f}, {task2.name} {task2_now:.1f}, drift {drift:.2g}",
                    refresh=False,
                )
            bar.update(step - bar.n)

        test(0)
        seconds += train(
            model,
            minibatches(
                task2, batch_size=settings.batch_size, epochs=settings.epochs, seed=seed + 1
            ),
            optimizer,
            scheduler,
            # The function to keep is the one in eval mode, running statistics included. Were these to follow
            # task 2's inputs, outputs on the anchors would change with no weight moving.
            freeze_batch_norm=True,
            after_step=test,
        )
    return Outcome(
        curve=curve,
        predictions_kept=anchors.predictions_kept(),
        drift_held_out=float(held_out.drift()),
        seconds=seconds,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted; the unfinished run left no results", file=sys.stderr)
        return 130


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    settings = _settings(parser, arguments)
    device = usable_device(parser, arguments.device)
    out: Path = arguments.out
    task1, task2 = _tasks(parser, arguments)
    if settings.anchors > len(task1.train_inputs):
        parser.error(
            f"argument --anchors: {settings.anchors} is more than the {len(task1.train_inputs)} "
            f"training inputs of {task1.name}"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {out}: {error.strerror}")

    seeds: list[int] = arguments.seeds or [arguments.seed]
    folders = {seed: out / f"seed-{seed}" if len(seeds) > 1 else out for seed in seeds}
    for folder in folders.values() if arguments.keep_networks else ():
        if (folder / "networks").exists():
            parser.error(
                f"argument --keep-networks: {folder / 'networks'} is there already; remove it or choose "
                "another --out"
            )

    names = {"task1": task1.name, "task2": task2.name}
    config = {**names, "validation": arguments.validation, **dataclasses.asdict(settings)}
    environment = report.environment(device)
    runs = []
    for seed, folder in folders.items():
        outcomes = run(
            task1,
            task2,
            settings,
            seed=seed,
            device=device,
            progress=arguments.progress,
            networks=folder / "networks" if arguments.keep_networks else None,
        )
        metrics = {name: outcome.metrics() for name, outcome in outcomes.items()}
        runs.append(metrics)
        print(f"\nseed {seed}\n{_table([metrics], **names)}")
        curves = {name: outcome.curve for name, outcome in outcomes.items()}
        report.plot_curves(folder / "path.png", fip=curves["fip"], naive=curves["naive"], **names)
        report.write_curves(folder / "path.csv", curves)
        report.write_results(
            folder / "results.json",
            recipe=RECIPE,
            config={**config, "seed": seed},
            environment=environment,
            metrics=_nested(metrics),
        )
        print(f"results.json, path.csv and path.png are in {folder}", flush=True)
    if len(seeds) > 1:
        print(f"\nseeds {', '.join(map(str, seeds))}: mean ± standard deviation")
        print(_table(runs, **names))
        by_method = {name: [metrics[name] for metrics in runs] for name in runs[0]}
        report.write_results(
            out / "results.json",
            recipe=RECIPE,
            config={**config, "seeds": seeds},
            environment=environment,
            metrics={
                **_nested({name: report.means(r) for name, r in by_method.items()}),
                "deviations": _nested(
                    {name: report.deviations(r) for name, r in by_method.items()}
                ),
            },
        )
        print(f"the means are in {out}/results.json")
    return 0


def _nested(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The metrics as ``results.json`` holds them: the baseline's below ours."""
    return {**metrics["fip"], "baselines": {"naive": dict(metrics["naive"])}}


def _table(runs: Sequence[Mapping[str, Mapping[str, float]]], *, task1: str, task2: str) -> str:
    columns = {
        "invariant path": [metrics["fip"] for metrics in runs],
        "plain training": [metrics["naive"] for metrics in runs],
    }
    return report.table(columns, task1=task1, task2=task2)


def _tasks(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[Task, Task]:
    try:
        task1, task2 = load_pair(
            arguments.task1,
            arguments.task2,
            data_root=arguments.data_root,
            download=arguments.download,
        )
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if arguments.validation > 0:
        return task1.held_out(arguments.validation), task2.held_out(arguments.validation)
    return task1, task2


def _settings(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Settings:
    """The defaults of the pair, and over them what the command line says."""
    try:
        family = check_pair(arguments.task1, arguments.task2)
    except DataError as error:
        parser.error(str(error))
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    settings = dataclasses.replace(DEFAULTS[family], **given)
    if settings.anchor_batch is not None and settings.anchor_batch > settings.anchors:
        if "anchor_batch" in given:
            parser.error(
                f"argument --anchor-batch: {settings.anchor_batch} is more than the "
                f"{settings.anchors} anchors"
            )
        settings = dataclasses.replace(settings, anchor_batch=None)
    try:
        settings.solver()
    except ValueError as error:
        parser.error(f"argument --{error}")
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Teach a trained network a second task while it keeps the first.",
        epilog="Defaults in brackets are those for digits / for mnist and fashion-mnist.",
    )
    data = parser.add_argument_group("data")
    names = [name for name, info in DATASETS.items() if info.family in DEFAULTS]
    data.add_argument("--task1", choices=names, default="digits-low", help="[%(default)s]")
    data.add_argument("--task2", choices=names, default="digits-high", help="[%(default)s]")
    add_data_options(data)

    where = parser.add_argument_group("run")
    add_run_options(where, RECIPE)
    where.add_argument(
        "--keep-networks",
        action="store_true",
        help="also keep the networks along the path, for FIPPath.open, in the folder networks of --out",
    )

    def setting(group: argparse._ArgumentGroup, option: str, help: str, **keywords: Any) -> None:
        name = option.removeprefix("--").replace("-", "_")
        defaults = [getattr(settings, name) for settings in DEFAULTS.values()]
        shown = " / ".join(
            "none" if d is None else f"{d:g}" if isinstance(d, float) else f"{d}" for d in defaults
        )
        group.add_argument(option, default=argparse.SUPPRESS, help=f"{help} [{shown}]", **keywords)

    learning = parser.add_argument_group("training")
    count = {"type": whole(1), "metavar": "N"}
    rate = {"type": positive, "metavar": "X"}
    setting(learning, "--task1-epochs", "epochs on task 1", **count)
    setting(learning, "--epochs", "epochs on task 2", **count)
    setting(learning, "--batch-size", "inputs of a training step", **count)
    setting(learning, "--task1-lr", "Adam's highest learning rate on task 1", **rate)
    setting(learning, "--naive-lr", "Adam's highest learning rate in plain training", **rate)

    path = parser.add_argument_group("functionally invariant path")
    setting(path, "--anchors", "training inputs of task 1 whose outputs are held", **count)
    setting(
        path,
        "--anchor-batch",
        "anchors drawn for each step, or none for all",
        type=or_none(whole(1)),
        metavar="N",
    )
    setting(
        path, "--output-space", "what of the output is held", choices=["logits", "probabilities"]
    )
    setting(path, "--beta", "weight of the new task", **rate)
    setting(path, "--eps", "length of a step, at the top of its schedule", **rate)
    setting(path, "--schedule", "course of the step length", choices=list(SCHEDULES))
    setting(
        path,
        "--momentum",
        "share of the last step's gradient that is kept",
        type=fraction,
        metavar="X",
    )
    setting(
        path,
        "--precondition",
        "geometry of the step",
        type=or_none(str),
        choices=["adam", None],
        metavar="{adam,none}",
    )
    setting(
        path,
        "--products",
        "metric products a step: a number, or adaptive",
        type=products,
        metavar="N",
    )
    setting(path, "--max-products", "most products of an adaptive step", **count)
    setting(
        path,
        "--radius",
        "how far an adaptive step may move the outputs on the anchors",
        type=or_none(positive),
        metavar="X",
    )
    setting(
        path,
        "--max-drift",
        "bound that drift on the anchors never passes",
        type=or_none(positive),
        metavar="X",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
