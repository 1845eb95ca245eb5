"""Learn tasks in turn, with a few remembered inputs of those before: ``python -m recipes.split_tasks --help``.

The classes of a data set are split into tasks of a few classes each, on one head. A network learns the first; then
copies of it learn the others in turn, along functionally invariant paths and in as many other ways as are asked for,
all on the same batches and with the same remembered inputs, which grow by some after every task.

Left in ``--out``: ``results.json``, for each seed and method a checkpoint for ``--resume``, and plots: ``tasks.png``
(each task's accuracy as others follow), ``bars.png``, ``scores.png`` and ``weights.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from recipes.common import kept, report
from recipes.common.augment import augmentation, many
from recipes.common.data import DataError, Task, load_task, split
from recipes.common.networks import digits_mlp, narrow_resnet18, xavier
from recipes.common.options import (
    add_data_options,
    add_run_options,
    run_recipe,
    usable_device,
    whole,
)
from recipes.common.progress import progress_bar
from recipes.common.training import (
    adam_one_cycle,
    minibatches,
    seed_everything,
    steps_an_epoch,
    train,
)
from recipes.continual import figures as continual_figures
from recipes.continual import sequence
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
from recipes.continual.sequence import Record, learn_sequence, within
from recipes.continual.tables import Row

RECIPE = "split_tasks"
PROGRAM = f"python -m recipes.{RECIPE}"
DEFAULT_METHODS = ("fip", "distillation", "naive")
# What the network after the first task depends on: of the configuration, and the seed.
OF_THE_START = (
    "data",
    "classes",
    "tasks",  # on one head
    "validation",
    "first_epochs",
    "batch_size",
    "first_lr",
    "loss_over",
    "shift",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Settings(sequence.Settings):
    """What may be tuned; every field is an option of the command line.

    Attributes:
        first_epochs: Passes over the first task, which all methods start from.
        epochs: Passes of the path over each later task.
        baseline_epochs: The same for the other methods, which get as much time as the path or more.
        batch_size: Inputs of a training step.
        first_lr: Adam's highest learning rate on the first task.
        loss_over: Whether the loss is among the classes of the task being learnt, or all of the head.
        shift: Whether the batches are shifted (and flipped, for photographs).
    """

    first_epochs: int
    epochs: int
    baseline_epochs: int
    batch_size: int
    first_lr: float = 3e-3
    loss_over: str = "task"
    shift: bool = False

    def epochs_of(self, method: str) -> int:
        """Passes of a method over each task after the first."""
        return self.epochs if method == "fip" else self.baseline_epochs


# For each data set: the classes of a task, and the defaults by budget.
CLASSES = {"digits": 2, "cifar100": 5}
_CIFAR100 = Settings(
    anchors=500,
    anchor_batch=50,
    first_epochs=10,
    epochs=3,
    baseline_epochs=4,
    batch_size=50,
    beta=10.0,
    eps=2.0,
    momentum=0.8,
    precondition="muon",
    max_products=8,
    radius=10.0,
    shift=True,
    tuning={
        "naive": Tuning(3e-3),
        "distillation": Tuning(3e-3, 0.1, momentum=0.5),
        "distillation-muon": Tuning(6e-3, 0.1),
        "replay": Tuning(3e-3, 1.0),
        "ewc": Tuning(1e-3, 1e4),
        "gem": Tuning(3e-3, 0.5),
        "lwf": Tuning(1e-3, 1.0),
    },
)
DEFAULTS = {
    ("digits", "short"): Settings(
        anchors=40,
        first_epochs=20,
        epochs=20,
        baseline_epochs=40,
        batch_size=32,
        beta=10.0,
        eps=0.8,
        max_products=8,
        tuning={
            "naive": Tuning(3e-3),
            "distillation": Tuning(3e-3, 0.1),
            "distillation-muon": Tuning(3e-3, 0.1),
            "replay": Tuning(3e-3, 1.0),
            "ewc": Tuning(3e-3, 100.0),
            "gem": Tuning(3e-3, 0.5),
            "lwf": Tuning(3e-3, 1.0),
        },
    ),
    ("cifar100", "short"): _CIFAR100,
    # For a GPU, where a network this small takes no longer for five times as many images at once, and a step of the
    # path three times as long as the others' for its launches.
    ("cifar100", "full"): dataclasses.replace(
        _CIFAR100,
        anchor_batch=250,
        batch_size=250,
        first_epochs=60,
        epochs=18,
        baseline_epochs=54,
        # Less momentum gains distillation nothing at this length.
        tuning={**_CIFAR100.tuning, "distillation": Tuning(3e-3, 0.1)},
    ),
}

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


def network(data: str, classes: int) -> nn.Module:
    """The network for a data set: the paper's narrow ResNet-18 for photographs.

    Its channels are last: on a CPU it takes 0.7 times as long for batches of 50 (one core).
    """
    if data == "digits":
        return digits_mlp(classes)
    return xavier(narrow_resnet18(classes)).to(memory_format=torch.channels_last)


class _Experiment:
    """The runs of all seeds and methods, and the files that they leave."""

    def __init__(
        self,
        data: str,
        tasks: Sequence[Task],
        settings: Settings,
        config: Mapping[str, Any],
        out: Path,
    ) -> None:
        self.data, self.tasks, self.settings = data, tasks, settings
        self.config, self.out = config, out
        self.loss = within(tasks[0].classes) if settings.loss_over == "task" else F.cross_entropy

    def folder(self, seed: int) -> Path:
        return self.out / f"seed-{seed}"

    def start_file(self, seed: int) -> Path:
        return self.folder(seed) / "first-task.safetensors"

    def checkpoint(self, seed: int, method: str) -> Path:
        return self.folder(seed) / f"{method}.pt"

    def config_of(self, seed: int) -> dict[str, Any]:
        """What a checkpoint depends on."""
        return {**self.config, "seed": seed}

    def config_of_start(self, seed: int) -> dict[str, Any]:
        """What the network after the first task depends on; it serves any run that agrees in these."""
        return {key: self.config_of(seed)[key] for key in OF_THE_START}

    def check_resumable(self, seeds: Sequence[int]) -> None:
        """Refuses what another configuration left.

        Raises:
            DataError: With the differences.
        """
        for seed in seeds:
            for method in METHODS:
                if (file := self.checkpoint(seed, method)).exists():
                    kept.load_state(file, self.config_of(seed))
            if (file := self.start_file(seed)).exists():
                kept.check_tensors(file, self.config_of_start(seed))

    def run(self, seed: int, method: str, *, progress: bool) -> Record:
        """One method from the first task to the last."""
        settings, device = self.settings, self.tasks[0].train_inputs.device
        model = self._start(seed, progress=progress).to(device)
        epochs = settings.epochs_of(method)
        total = sum(epochs * steps_an_epoch(t, settings.batch_size) for t in self.tasks[1:])
        with progress_bar(f"seed {seed}, {method}", total, shown=progress) as show:
            return learn_sequence(
                method,
                model,
                self.tasks,
                settings,
                epochs=epochs,
                batch_size=settings.batch_size,
                loss=self.loss,
                shift=augmentation(self.data) if settings.shift else None,
                augment=many(self.data, settings.views) if settings.augment else None,
                seed=seed,
                checkpoint=self.checkpoint(seed, method),
                config=self.config_of(seed),
                progress=show,
            )

    def _start(self, seed: int, *, progress: bool) -> nn.Module:
        """The network after the first task: the same for all methods."""
        seed_everything(seed)
        model = network(self.data, self.tasks[-1].class_range[1])
        file = self.start_file(seed)
        if file.exists():
            model.load_state_dict(kept.load_tensors(file, self.config_of_start(seed)))
            return model
        task, settings = self.tasks[0], self.settings
        model = model.to(task.train_inputs.device)
        steps = settings.first_epochs * steps_an_epoch(task, settings.batch_size)
        batches = minibatches(
            task, batch_size=settings.batch_size, epochs=settings.first_epochs, seed=seed
        )
        shift = augmentation(self.data) if settings.shift else None
        with tqdm(
            total=steps, desc=f"seed {seed}, first task", unit="step", disable=not progress
        ) as bar:
            train(
                model,
                ((shift(x), y) for x, y in batches) if shift else batches,
                *adam_one_cycle(model, lr=settings.first_lr, steps=steps),
                loss=self.loss,
                after_step=lambda step: bar.update(step - bar.n),
            )
        kept.save_tensors(file, model.state_dict(), self.config_of_start(seed))
        return model

    def prepare(self, seed: int, *, resume: bool) -> None:
        """The folder of a seed; what an earlier run left goes, unless it is resumed."""
        folder = self.folder(seed)
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            for file in (self.start_file(seed), *(self.checkpoint(seed, m) for m in METHODS)):
                file.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    return run_recipe(lambda: _main(argv), PROGRAM, "loses the task in hand alone")


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = usable_device(parser, arguments.device)
    key = (arguments.data, arguments.budget)
    if key not in DEFAULTS:
        parser.error(f"argument --budget: {arguments.data} has the budget short alone")
    settings = settings_from(parser, arguments, DEFAULTS[key])
    if settings.hold != "all" and settings.output_space != "logits":
        parser.error(
            f"argument --hold: {settings.hold} goes with --output-space logits, got "
            f"{settings.output_space!r}; give --hold all"
        )
    methods = chosen_methods(parser, arguments)
    try:
        task = load_task(arguments.data, data_root=arguments.data_root, download=arguments.download)
        if arguments.validation > 0:
            task = task.held_out(arguments.validation)
        tasks = [t.to(device) for t in split(task, arguments.classes or CLASSES[arguments.data])]
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if len(tasks) < 2:
        parser.error("argument --classes: that leaves one task; two or more are a sequence")
    if arguments.tasks is not None and arguments.tasks > len(tasks):
        parser.error(f"argument --tasks: {arguments.tasks} is more than the {len(tasks)} there are")
    tasks = tasks[: arguments.tasks]
    fewest = min(len(t.train_inputs) for t in tasks)
    if settings.anchors > fewest:
        parser.error(
            f"argument --anchors: {settings.anchors} is more than the {fewest} training inputs of a task"
        )
    config = {
        "data": arguments.data,
        "budget": arguments.budget,
        "classes": tasks[0].classes,
        "tasks": len(tasks),
        "validation": arguments.validation,
        **dataclasses.asdict(settings),
    }
    seeds: list[int] = arguments.seeds or [arguments.seed]
    experiment = _Experiment(arguments.data, tasks, settings, config, arguments.out)
    if arguments.resume:
        try:
            experiment.check_resumable(seeds)
        except DataError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
    try:
        for seed in seeds:
            experiment.prepare(seed, resume=arguments.resume)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {arguments.out}: {error.strerror}")
    records: dict[str, list[Record]] = {method: [] for method in methods}
    for seed in seeds:
        for method in methods:
            record = experiment.run(seed, method, progress=arguments.progress)
            records[method].append(record)
            found = record.metrics()
            print(
                f"seed {seed}, {method}: {found['within_task']:.2f} within tasks, "
                f"{found['all_classes']:.2f} among all classes, {found['seconds']:.0f} s",
                flush=True,
            )
    _report(arguments.out, records, {**config, "seeds": seeds}, device)
    return 0


def _report(
    out: Path,
    records: Mapping[str, Sequence[Record]],
    config: Mapping[str, Any],
    device: torch.device,
) -> None:
    """The table, ``results.json`` and the plots."""
    runs = {method: [r.metrics() for r in found] for method, found in records.items()}
    print(f"\n{continual_tables.summary(runs, _ROWS)}")
    metrics = report.over_seeds(runs)
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
    continual_figures.tasks(out / "tasks.png", {m: r.within_task for m, r in first.items()})
    kinds = {"within_task": "within tasks", "all_classes": "among all classes"}
    continual_figures.bars(out / "bars.png", runs, kinds)
    continual_figures.score_maps(
        out / "scores.png",
        {m: (range(1, len(r.scores) + 1), torch.stack(r.scores)) for m, r in first.items()},
        ("all tasks, in turn",),
        along="tasks learnt",
    )
    ways = {m: torch.stack(r.weights) for m, r in first.items() if m in ("fip", "naive")}
    if ways:
        continual_figures.weight_space(out / "weights.png", ways)
    print(f"results.json and the plots are in {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Learn tasks in turn, with a few remembered inputs of those before.",
        epilog="Defaults in brackets are those for "
        + ", ".join(f"{data} ({budget})" for data, budget in DEFAULTS)
        + ".",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=list(CLASSES), default="digits", help="[%(default)s]")
    data.add_argument(
        "--classes",
        help=f"classes of a task [{' / '.join(map(str, CLASSES.values()))}]",
        **COUNT,
    )
    data.add_argument(
        "--tasks",
        help="the first so many tasks alone, on a head of their classes [all]",
        type=whole(2),
        metavar="N",
    )
    add_data_options(data)
    where = parser.add_argument_group("run")
    add_run_options(where, RECIPE)
    add_method_option(where, DEFAULT_METHODS)
    where.add_argument(
        "--budget",
        choices=["short", "full"],
        default="short",
        help="short is for two cores, full for a GPU: the same tasks, more epochs [%(default)s]",
    )
    learning, options = parser.add_argument_group("training"), SettingOptions(DEFAULTS.values())
    options.add(learning, "--first-epochs", "epochs on the first task", **COUNT)
    options.add(learning, "--epochs", "epochs of the path on each later task", **COUNT)
    options.add(learning, "--baseline-epochs", "the same for the other methods", **COUNT)
    options.add(learning, "--batch-size", "inputs of a training step", **COUNT)
    options.add(learning, "--first-lr", "Adam's highest learning rate on the first task", **RATE)
    options.add(
        learning,
        "--loss-over",
        "classes in the loss: the task's or all",
        choices=["task", "all"],
    )
    options.add(
        learning,
        "--shift",
        "shift (and flip) the batches",
        action=argparse.BooleanOptionalAction,
    )
    options.add(
        learning,
        "--hold",
        "outputs held on a remembered input: all, those of known classes, or of its own task",
        choices=["all", "known", "task"],
    )
    options.add(
        learning,
        "--batch-norm",
        "normalise by the first task's statistics, or by each batch's",
        choices=["frozen", "batch"],
    )
    options.add_learners(parser)
    return parser
