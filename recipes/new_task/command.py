"""Teach a trained network a second task while it keeps the first: ``python -m recipes.new_task --help``.

A network learns task 1. Then copies of it learn task 2 from the same weights, on the same batches and with the same few
remembered training inputs of task 1: along a functionally invariant path, and in as many other ways as are asked for.
Networks on all ways are tested on both tasks.

Left in ``--out``: ``results.json`` (configuration, environment, metrics), ``path.csv`` (every network tested), and
``path.png`` (both accuracies and the drift along the way), ``bars.png`` (the methods side by side), ``scores.png`` (how
sure the networks on the way are of single test images) and ``weights.png`` (the ways in weight space). Beside them each
method's outcome, with which ``--resume`` goes on after an interruption.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fipoptim import AnchorBatch
from recipes.common import kept, report
from recipes.common.augment import many
from recipes.common.data import DATASETS, DataError, Task, check_pair, load_pair
from recipes.common.networks import network_for
from recipes.common.options import add_data_options, add_run_options, run_recipe, usable_device
from recipes.common.process_memory import PeakMemory
from recipes.common.report import Curve, Metrics, Outcome
from recipes.common.training import (
    accuracy,
    adam_one_cycle,
    minibatches,
    scores,
    seed_everything,
    steps_an_epoch,
    steps_of,
    train,
)
from recipes.continual import figures as continual_figures
from recipes.continual import learners
from recipes.continual import tables as continual_tables
from recipes.continual.learners import METHODS, Tuning
from recipes.continual.options import (
    COUNT,
    RATE,
    SettingOptions,
    add_method_option,
    chosen_methods,
    settings_from,
)
from recipes.continual.tables import Row

RECIPE = "new_task"
PROGRAM = f"python -m recipes.{RECIPE}"
DEFAULT_METHODS = ("fip", "distillation", "naive")
EARLY_STEPS = (0, 1, 2, 3, 5, 10, 20, 50, 100)  # where a switch of task does its damage
TESTED_EVENLY = 20  # networks on the way that are tested beside these
HELD_OUT = 2000  # test inputs of task 1 on which drift is measured as well
SCORED = 60  # test images of each task whose scores are drawn
IN_WEIGHT_SPACE = ("fip", "naive")  # the ways that are drawn there
DRAWN_THERE = 10  # networks of each


@dataclass(frozen=True, kw_only=True)
class Settings(learners.Settings):
    """What may be tuned; every field is an option of the command line.

    Attributes:
        task1_epochs: Passes over task 1.
        epochs: Passes of the path over task 2.
        baseline_epochs: Passes of the other methods, which get as much time as the path or more.
        batch_size: Inputs of a training step.
        task1_lr: Adam's highest learning rate on task 1.
    """

    task1_epochs: int
    epochs: float
    baseline_epochs: float
    batch_size: int
    task1_lr: float = 3e-3

    def epochs_of(self, method: str) -> float:
        """Passes of a method over task 2."""
        return self.epochs if method == "fip" else self.baseline_epochs


# The defaults in which the families of data sets in recipes.common.data.DATASETS differ.
DEFAULTS = {
    "digits": Settings(
        anchors=200,
        task1_epochs=20,
        epochs=20,
        baseline_epochs=200,
        batch_size=32,
        beta=10.0,
        eps=0.8,
        max_products=8,
        tuning={
            "naive": Tuning(3e-3),
            "distillation": Tuning(1e-2, 0.03),
            "distillation-muon": Tuning(1e-2, 0.03),
            "replay": Tuning(3e-3, 1.0),
            "ewc": Tuning(3e-3, 100.0),
            "gem": Tuning(3e-3, 0.5),
            "lwf": Tuning(3e-3, 1.0),
        },
    ),
    "mnist": Settings(
        anchors=500,
        anchor_batch=25,
        augment=True,
        task1_epochs=2,
        epochs=5,
        baseline_epochs=6.5,
        batch_size=100,
        beta=60.0,
        eps=0.5,
        momentum=0.9,
        precondition="muon",
        radius=10.0,
        max_products=16,
        tuning={
            "naive": Tuning(3e-3),
            "distillation": Tuning(3e-3, 0.015),
            "distillation-muon": Tuning(3e-3, 0.015),
            "replay": Tuning(1e-3, 1.0),
            "ewc": Tuning(1e-4, 1e5),
            "gem": Tuning(1e-3, 0.5),
            "lwf": Tuning(1e-4, 100.0),
        },
    ),
}


def run(
    task1: Task,
    task2: Task,
    settings: Settings,
    methods: Sequence[str],
    *,
    seed: int,
    device: torch.device,
    folder: Path,
    config: Mapping[str, Any],
    progress: bool = True,
    keep_networks: bool = False,
) -> dict[str, Outcome]:
    """Trains on task 1, then on task 2 by each method.

    Args:
        task1: What the network learns first and is to keep.
        task2: What it learns then.
        settings: How.
        methods: Of ``recipes.continual.learners.METHODS``.
        seed: Of the weights, the batches and the choice of anchors.
        device: Where.
        folder: Gets the network after task 1 and the outcome of each method, as they are finished; what is there
            already is taken over, so :class:`Files` clears or checks it before.
        config: The run's, stored with every file.
        progress: Whether to show progress bars.
        keep_networks: Whether the networks along the invariant path are left there too, for ``FIPPath.open``.

    Returns:
        The outcome of each method.

    Raises:
        DataError: If a file in ``folder`` is of another configuration, or cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = Files(folder, config)
    task1, task2 = task1.to(device), task2.to(device)
    seed_everything(seed)
    model = network_for(DATASETS[task1.name].family, task1.classes + task2.classes).to(device)
    if files.start.exists():
        model.load_state_dict(kept.load_tensors(files.start, files.start_config))
    else:
        learn_first_task(model, task1, settings, seed=seed, progress=progress)
        kept.save_tensors(files.start, model.state_dict(), files.start_config)
    memory = remembered(task1, settings.anchors, seed)
    outcomes = {}
    for method in methods:
        file = files.outcome(method)
        if file.exists():
            outcomes[method] = Outcome.of(kept.load_state(file, config))
            continue
        seed_everything(seed)  # whatever ran before
        recorded = None
        if keep_networks and method == "fip":
            recorded = files.networks
            if recorded.exists():
                shutil.rmtree(recorded)  # of this run when it was interrupted: others were refused
            kept.save_record(files.networks_record, {}, config)
        outcomes[method] = _learn_second_task(
            method,
            copy.deepcopy(model),
            task1,
            task2,
            memory,
            settings,
            seed=seed,
            progress=progress,
            networks=recorded,
        )
        kept.save_state(file, outcomes[method].state(), config)
    return outcomes


class Files:
    """What a seed's run leaves in its folder and a resumed run reads back.

    Args:
        folder: The seed's.
        config: The run's, with its seed.
    """

    # What the network after task 1 depends on; it serves any run that agrees in these.
    _OF_THE_START = (
        "task1",
        "task2",  # whose classes are on the same head
        "validation",
        "task1_epochs",
        "batch_size",
        "task1_lr",
        "seed",
    )

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.config = config
        self.start_config = {key: config[key] for key in self._OF_THE_START}
        self.start = folder / "first-task.safetensors"
        self.networks, self.networks_record = folder / "networks", folder / "networks.json"
        self.folder = folder

    def outcome(self, method: str) -> Path:
        """Where the outcome of a method is."""
        return self.folder / f"{method}.pt"

    def clear(self) -> None:
        """Removes what a resumed run would take for this run's."""
        for old in (self.start, *map(self.outcome, METHODS)):
            old.unlink(missing_ok=True)

    def check(self, *, keep_networks: bool) -> None:
        """Refuses what another configuration left.

        Raises:
            DataError: With the differences.
        """
        outcomes = [file for method in METHODS if (file := self.outcome(method)).exists()]
        for file in outcomes:
            kept.load_state(file, self.config)
        if self.start.exists():
            kept.check_tensors(self.start, self.start_config)
        if not keep_networks:
            return
        of_this_run = kept.load_record(self.networks_record, self.config) is not None
        if self.networks.exists() and not of_this_run:
            raise DataError(
                f"--keep-networks: {self.networks} is not of this run; remove it or choose another --out"
            )
        if self.outcome("fip") in outcomes and not of_this_run:
            raise DataError(
                "--keep-networks: the path was finished without keeping its networks; remove "
                f"{self.outcome('fip')} to walk it again"
            )


def spacing(steps: int) -> int:
    """Networks on the way are recorded and tested each time this many steps are taken."""
    return max(1, round(steps / TESTED_EVENLY))


def tested_steps(steps: int) -> list[int]:
    """The networks tested, by the step that made them: the recorded ones, and the first ones more densely."""
    early = {step for step in EARLY_STEPS if step <= steps}
    return sorted(early | {*range(0, steps, spacing(steps)), steps})


def drawn_steps(steps: int) -> set[int]:
    """Those of the tested networks that are drawn in weight space."""
    tested = tested_steps(steps)
    return {*tested[:: math.ceil(len(tested) / DRAWN_THERE)], steps}


def remembered(task: Task, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Training inputs and labels of a task, drawn for the methods to remember."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(task.train_inputs), generator=generator)[:count]
    chosen = chosen.to(task.train_inputs.device)
    return task.train_inputs[chosen], task.train_labels[chosen]


def learn_first_task(
    model: nn.Module, task: Task, settings: Settings, *, seed: int, progress: bool
) -> None:
    """Trains on a task from scratch by Adam on one cycle."""
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
    method: str,
    model: nn.Module,
    task1: Task,
    task2: Task,
    memory: tuple[Tensor, Tensor],
    settings: Settings,
    *,
    seed: int,
    progress: bool,
    networks: Path | None,
) -> Outcome:
    inputs, labels = memory
    # Only measure, never move: the same outputs before and after for all ways of training.
    anchors = AnchorBatch(model, inputs, output=settings.output_space)
    held_out = AnchorBatch(model, task1.test_inputs[:HELD_OUT], output=settings.output_space)
    epochs = settings.epochs_of(method)
    steps = steps_of(task2, settings.batch_size, epochs)
    # The function to keep is the one in eval mode, running statistics included. Were these to follow task 2's
    # inputs, outputs on the anchors would change with no weight moving.
    learner = learners.learner(
        method,
        model,
        settings,
        augment=many(task1.name, settings.views) if settings.augment else None,
        seed=seed,
        freeze_batch_norm=True,
    )
    learner.remember(inputs, labels)
    title = METHODS[method].title
    curve, weights, sure = Curve(), list[Tensor](), list[Tensor]()
    wanted, drawn = set(tested_steps(steps)), drawn_steps(steps)
    with tqdm(total=steps, desc=f"{task2.name}, {title}", unit="step", disable=not progress) as bar:

        def test(step: int) -> None:
            if step in wanted:
                first = accuracy(model, task1.test_inputs, task1.test_labels)
                second = accuracy(model, task2.test_inputs, task2.test_labels)
                drift = float(anchors.drift())
                curve.add(step, first, second, drift)
                sure.append(
                    torch.cat(
                        [
                            scores(model, t.test_inputs[:SCORED], t.test_labels[:SCORED])
                            for t in (task1, task2)
                        ]
                    ).cpu()
                )
                if method in IN_WEIGHT_SPACE and step in drawn:
                    flat = [p.detach().flatten() for p in model.parameters()]
                    weights.append(torch.cat(flat).cpu())
                bar.set_postfix_str(
                    f"{task1.name} {first:.1f}, {task2.name} {second:.1f}, drift {drift:.2g}",
                    refresh=False,
                )
            bar.update(step - bar.n)

        test(0)
        with PeakMemory(inputs.device) as peak:
            seconds = learner.learn(
                minibatches(task2, batch_size=settings.batch_size, epochs=epochs, seed=seed + 1),
                steps=steps,
                after_step=test,
                record=None if networks is None else (spacing(steps), networks),
            )
    return Outcome(
        curve=curve,
        predictions_kept=anchors.predictions_kept(),
        drift_held_out=float(held_out.drift()),
        within_task={
            name: accuracy(model, t.test_inputs, t.test_labels, classes=t.class_range)
            for name, t in (("task1", task1), ("task2", task2))
        },
        remembered_megabytes=learner.remembered_bytes() / 1e6,
        seconds=seconds,
        peak_megabytes=None if peak.peak is None else peak.peak / 1e6,
        scores=torch.stack(sure),
        weights=torch.stack(weights) if weights else None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    return run_recipe(lambda: _main(argv), PROGRAM, "loses the method in hand alone")


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
    methods = chosen_methods(parser, arguments)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {out}: {error.strerror}")

    seeds: list[int] = arguments.seeds or [arguments.seed]
    folders = {seed: out / f"seed-{seed}" if arguments.seeds else out for seed in seeds}
    names = {"task1": task1.name, "task2": task2.name}
    rows = _rows(**names)
    config = {**names, "validation": arguments.validation, **dataclasses.asdict(settings)}
    _prepare(
        parser, [Files(folder, {**config, "seed": s}) for s, folder in folders.items()], arguments
    )

    environment = report.environment(device)
    runs: dict[str, list[Metrics]] = {name: [] for name in methods}
    for seed, folder in folders.items():
        outcomes = run(
            task1,
            task2,
            settings,
            methods,
            seed=seed,
            device=device,
            folder=folder,
            config={**config, "seed": seed},
            progress=arguments.progress,
            keep_networks=arguments.keep_networks,
        )
        one = {name: [outcome.metrics()] for name, outcome in outcomes.items()}
        for name, metrics in one.items():
            runs[name] += metrics
        print(f"\nseed {seed}\n{continual_tables.summary(one, rows)}")
        _draw(folder, outcomes, **names)
        report.write_curves(folder / "path.csv", {name: o.curve for name, o in outcomes.items()})
        report.write_results(
            folder / "results.json",
            recipe=RECIPE,
            config={**config, "methods": methods, "seed": seed},
            environment=environment,
            metrics=report.over_seeds(one),
        )
        print(f"results.json, path.csv and the plots are in {folder}", flush=True)
    if len(seeds) > 1:
        print(f"\nseeds {', '.join(map(str, seeds))}: mean ± standard deviation")
        print(continual_tables.summary(runs, rows))
        continual_figures.bars(out / "bars.png", runs, _bars(**names))
        report.write_results(
            out / "results.json",
            recipe=RECIPE,
            config={**config, "methods": methods, "seeds": seeds},
            environment=environment,
            metrics=report.over_seeds(runs),
        )
        print(f"the means are in {out}/results.json")
    return 0


def _prepare(
    parser: argparse.ArgumentParser, seeds: Sequence[Files], arguments: argparse.Namespace
) -> None:
    """Clears the folders of all seeds before the first one runs, or checks them if they are resumed."""
    for files in seeds:
        if arguments.resume:
            try:
                files.check(keep_networks=arguments.keep_networks)
            except DataError as error:
                parser.error(f"argument {error}")
        elif arguments.keep_networks and files.networks.exists():
            parser.error(
                f"argument --keep-networks: {files.networks} is there already; remove it or choose another --out"
            )
    if not arguments.resume:
        for files in seeds:
            files.clear()


def _draw(folder: Path, outcomes: Mapping[str, Outcome], *, task1: str, task2: str) -> None:
    names = {"task1": task1, "task2": task2}
    continual_figures.curves(
        folder / "path.png", {name: o.curve for name, o in outcomes.items()}, **names
    )
    continual_figures.score_maps(
        folder / "scores.png",
        {name: (o.curve.steps, o.scores) for name, o in outcomes.items()},
        (task1, task2),
        along=f"steps on {task2}",
    )
    continual_figures.bars(
        folder / "bars.png", {name: [o.metrics()] for name, o in outcomes.items()}, _bars(**names)
    )
    ways = {name: o.weights for name, o in outcomes.items() if o.weights is not None}
    if ways:
        continual_figures.weight_space(folder / "weights.png", ways)


def _bars(*, task1: str, task2: str) -> dict[str, str]:
    return {
        "task1_after": task1,
        "task2_after": task2,
        "mean_after": "mean of both",
        "task1_worst_on_path": f"{task1}, worst on the way",
    }


def _rows(*, task1: str, task2: str) -> list[Row]:
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
        Row("remembered_megabytes", "remembered (MB)", ".3g"),
        Row("peak_megabytes", "peak memory (MB)", ".0f"),
        Row("steps", f"steps on {task2}", ".0f"),
        Row("seconds", f"seconds on {task2}", ".1f", compared=True),
    ]


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
    return settings_from(parser, arguments, DEFAULTS[family])


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
    add_method_option(where, DEFAULT_METHODS)
    where.add_argument(
        "--keep-networks",
        action="store_true",
        help="also keep the networks along the path, for FIPPath.open, in the folder networks of --out",
    )

    learning, options = parser.add_argument_group("training"), SettingOptions(DEFAULTS.values())
    options.add(learning, "--task1-epochs", "epochs on task 1", **COUNT)
    options.add(learning, "--epochs", "epochs of the path on task 2", **RATE)
    options.add(learning, "--baseline-epochs", "epochs of the other methods on task 2", **RATE)
    options.add(learning, "--batch-size", "inputs of a training step", **COUNT)
    options.add(learning, "--task1-lr", "Adam's highest learning rate on task 1", **RATE)
    options.add_learners(parser)
    return parser
