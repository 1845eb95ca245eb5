"""Take weights out of a trained network while it keeps its function: ``python -m recipes.sparsify --help``.

From a dense network a functionally invariant path leads to networks of which a given share of the weights is exactly
zero. The secondary objective is the distance to the nearest sparse network, nearest in the anchors' metric; what is
kept are the dense network's outputs on training inputs, and no label is read. Other ways to sparse networks are run
beside it, from the same dense network.

Left in ``--out``: ``results.json``, a safetensors file for each network (it loads into the plain model), and plots.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm import tqdm

from fipoptim import Solver
from fipoptim.secondary import SparseProjection
from recipes import report, sparse_export, sparsify_figures
from recipes.augment import Augment, augmentation
from recipes.data import DataError, Task, load_task
from recipes.networks import digits_mlp, lenet_300_100, resnet20
from recipes.options import (
    add_data_options,
    add_run_options,
    fraction,
    number,
    or_none,
    positive,
    products,
    usable_device,
    whole,
)
from recipes.pruning import METHODS, Dense, Settings, SparseNetwork, sparsify, total_steps
from recipes.training import accuracy, adam_one_cycle, minibatches, seed_everything, steps_an_epoch

RECIPE = "sparsify"
PROGRAM = f"python -m recipes.{RECIPE}"
DEFAULT_METHODS = ("fip", "gradual-distillation", "one-shot")
EARLY = 0.05  # of the dense network's training: where the lottery ticket rewinds to


@dataclass(frozen=True)
class Network:
    """A network that can be sparsified here: how it is built, trained, and on what."""

    build: Callable[[], nn.Module]
    data: tuple[str, ...]
    sparsities: tuple[float, ...]
    dense_epochs: int
    dense_batch_size: int
    settings: Settings


NETWORKS = {
    "digits-mlp": Network(
        digits_mlp,
        data=("digits",),
        sparsities=(0.9, 0.95, 0.98),
        dense_epochs=60,
        dense_batch_size=32,
        settings=Settings(
            epochs=60,
            batch_size=128,
            lr=2e-3,
            baseline_epochs=450,
            baseline_lr=5e-3,
            products="adaptive",
            eps=1.5,
        ),
    ),
    "lenet-300-100": Network(
        lenet_300_100,
        data=("mnist", "fashion-mnist"),
        sparsities=(0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.985, 0.989, 0.991, 0.994),
        dense_epochs=15,
        dense_batch_size=128,
        settings=Settings(
            epochs=5,
            batch_size=128,
            lr=2e-3,
            baseline_epochs=8,
            baseline_lr=3e-3,
            mask_every=40,
            probes=8,
            metric_batch=500,
            metric_decay=0.9,
        ),
    ),
    "resnet20": Network(
        resnet20,
        data=("cifar10",),
        sparsities=(0.93, 0.95),
        dense_epochs=40,
        dense_batch_size=128,
        settings=Settings(
            epochs=8,
            batch_size=64,
            lr=1e-3,
            baseline_epochs=8,
            baseline_lr=4e-3,
            mask_every=40,
            probes=2,
            augment="labels",
            autocast=True,
        ),
    ),
}


def train_dense(
    network: Network,
    task: Task,
    *,
    augment: Augment | None,
    autocast: bool,
    seed: int,
    progress: Callable[[int, str], None] = lambda steps, text: None,
) -> Dense:
    """Trains the start network on labels.

    Networks with batch norm by SGD with Nesterov momentum, weight decay and augmentation, others by Adam; both on one
    cycle.
    """
    seed_everything(seed)
    model = network.build().to(task.train_inputs.device)
    batch_size, epochs = network.dense_batch_size, network.dense_epochs
    steps = epochs * steps_an_epoch(task, batch_size)
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.4, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        scheduler = OneCycleLR(optimizer, max_lr=0.4, total_steps=steps + 1, cycle_momentum=False)
    else:
        augment = None
        optimizer, scheduler = adam_one_cycle(model, lr=3e-3, steps=steps)
    early = {}
    model.train()
    batches = minibatches(task, batch_size=batch_size, epochs=epochs, seed=seed)
    for step, (x, y) in enumerate(batches):
        if step == round(EARLY * steps):
            early = {name: t.clone() for name, t in model.state_dict().items()}
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(augment(x) if augment else x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress(1, "dense network")
    return Dense(model, early)


def load_dense(path: Path, model: nn.Module) -> Dense:
    """A start network from a safetensors file, or a state dict that torch saved.

    Raises:
        DataError: If the file cannot be read, or its names or shapes are not the model's.
    """
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read as weights: {reason}") from error
    own = model.state_dict()
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise DataError(f"{path} holds no state dict of tensors; save model.state_dict()")
    # A safetensors file of a network with batch norm may leave out the counters.
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unknown = [n for n in state if n not in own]
    other = [
        f"{n} is {tuple(state[n].shape)}, not {tuple(t.shape)}"
        for n, t in own.items()
        if n in state and state[n].shape != t.shape
    ]
    if missing or unknown or other:
        said = [
            f"{label} {', '.join(items[:3])}{' and more' if len(items) > 3 else ''}"
            for label, items in (("lacks", missing), ("has unknown", unknown), ("", other))
            if items
        ]
        raise DataError(f"{path} does not fit the network: {'; '.join(said).strip()}")
    model.load_state_dict({**own, **state})
    return Dense(model, None)


# --- the command line -----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print(
            f"\n{PROGRAM}: interrupted; go on with --resume, which keeps the methods that were finished",
            file=sys.stderr,
        )
        return 130


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    name = arguments.network or _network_of(parser, arguments.data)
    network = NETWORKS[name]
    data = arguments.data or network.data[0]
    if data not in network.data:
        parser.error(
            f"argument --data: {name} takes {' or '.join(network.data)}, got {data!r}; "
            f"choose another --network ({', '.join(NETWORKS)})"
        )
    settings, sparsities = _settings(parser, arguments, network)
    device = usable_device(parser, arguments.device)
    checkpoint = None
    try:
        if arguments.checkpoint is not None:
            checkpoint = load_dense(arguments.checkpoint, network.build())
        task = load_task(data, data_root=arguments.data_root, download=arguments.download)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if arguments.validation > 0:
        task = task.held_out(arguments.validation)
    if settings.anchors is not None and settings.anchors > len(task.train_inputs):
        parser.error(
            f"argument --anchors: {settings.anchors} is more than the {len(task.train_inputs)} "
            f"training inputs of {data}"
        )
    seeds: list[int] = arguments.seeds or [arguments.seed]
    methods = list(METHODS) if "all" in arguments.method else list(dict.fromkeys(arguments.method))
    config = {
        "network": name,
        "data": data,
        "checkpoint": None if checkpoint is None else arguments.checkpoint.name,
        "dense_epochs": network.dense_epochs,
        "validation": arguments.validation,
        "sparsities": list(sparsities),
        **dataclasses.asdict(settings),
    }
    experiment = _Experiment(
        network,
        task.to(device),
        sparsities,
        settings,
        augmentation(data),
        json.loads(json.dumps(config)),  # as it is read back
        arguments.out,
        report.environment(device),
    )
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.resume:
            experiment.check_resumable(seeds, methods)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {arguments.out}: {error.strerror}")
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    for seed in seeds:
        experiment.run(
            seed,
            methods,
            checkpoint,
            resume=arguments.resume,
            progress=arguments.progress,
        )
    experiment.report(seeds, methods, export=arguments.export)
    return 0


class _Experiment:
    """The runs of all seeds and methods on one network, and the files that they leave."""

    def __init__(
        self,
        network: Network,
        task: Task,
        sparsities: Sequence[float],
        settings: Settings,
        augment: Augment,
        config: Mapping[str, Any],
        out: Path,
        environment: Mapping[str, Any],
    ) -> None:
        self.network, self.task, self.settings = network, task, settings
        self.sparsities, self.augment, self.config = sparsities, augment, config
        self.out, self.environment = out, environment

    def folder(self, seed: int) -> Path:
        return self.out / f"seed-{seed}"

    def file(self, seed: int, method: str, sparsity: float) -> Path:
        return self.folder(seed) / f"{method}-{sparsity:g}.safetensors"

    def finished(self, seed: int, method: str) -> dict[str, Any] | None:
        """The record of a finished run."""
        return report.read_json(self.folder(seed) / f"{method}.json")

    def check_resumable(self, seeds: Sequence[int], methods: Sequence[str]) -> None:
        """Refuses finished runs of another configuration.

        Raises:
            DataError: With the differences.
        """
        for seed in seeds:
            for method in methods:
                record = self.finished(seed, method)
                different = report.differences(record["config"], self.config) if record else ""
                if different:
                    raise DataError(
                        f"--resume: {self.folder(seed)}/{method}.json is of another configuration "
                        f"({different}); choose another --out"
                    )

    def run(
        self,
        seed: int,
        methods: Sequence[str],
        checkpoint: Dense | None,
        *,
        resume: bool,
        progress: bool,
    ) -> None:
        """All methods of one seed, from one dense network."""
        self.folder(seed).mkdir(parents=True, exist_ok=True)
        wanted = [m for m in methods if not (resume and self.finished(seed, m))]
        if not wanted:
            return
        dense = self._dense(seed, checkpoint, progress=progress, resume=resume)
        dense_accuracy = accuracy(
            dense.model, self.task.test_inputs, self.task.test_labels, batch_size=500
        )
        for method in wanted:
            steps = total_steps(method, self.task, self.sparsities, self.settings)
            with tqdm(
                total=steps, desc=f"seed {seed}, {method}", unit="step", disable=not progress
            ) as bar:
                done = sparsify(
                    method,
                    dense,
                    self.task,
                    self.sparsities,
                    self.settings,
                    augment=self.augment,
                    seed=seed,
                    progress=_on(bar),
                )
            for network in done.networks:
                report.save_tensors(self.file(seed, method, network.wanted), network.state)
            if done.path:
                path = self.folder(seed) / "path.safetensors"
                report.save_tensors(path, {"path": torch.stack(done.path)})
            record = {
                "config": self.config,
                "environment": self.environment,
                "dense_accuracy": dense_accuracy,
                "networks": [network.metrics() for network in done.networks],
            }
            report.write_json(self.folder(seed) / f"{method}.json", record)
            print(_line(seed, method, dense_accuracy, done.networks), flush=True)

    def _dense(self, seed: int, checkpoint: Dense | None, *, progress: bool, resume: bool) -> Dense:
        """The dense network: the checkpoint's, one that an earlier run has trained, or one trained now."""
        device = self.task.train_inputs.device
        file, early = (self.folder(seed) / f"{n}.safetensors" for n in ("dense", "dense-early"))
        if checkpoint is not None:
            dense = checkpoint
            report.save_tensors(file, dense.model.state_dict())
        elif resume and file.exists() and early.exists():
            dense = load_dense(file, self.network.build())
            dense = Dense(dense.model, {k: t.to(device) for k, t in load_file(early).items()})
        else:
            epoch = steps_an_epoch(self.task, self.network.dense_batch_size)
            total = self.network.dense_epochs * epoch
            with tqdm(
                total=total, desc=f"seed {seed}, dense", unit="step", disable=not progress
            ) as bar:
                dense = train_dense(
                    self.network,
                    self.task,
                    augment=self.augment,
                    autocast=self.settings.autocast,
                    seed=seed,
                    progress=_on(bar),
                )
            assert dense.early is not None
            report.save_tensors(early, dense.early)
            report.save_tensors(file, dense.model.state_dict())
        model = dense.model.to(device)
        if any(isinstance(m, nn.Conv2d) for m in model.modules()):
            model = model.to(memory_format=torch.channels_last)
        return Dense(model, dense.early)

    def report(self, seeds: Sequence[int], methods: Sequence[str], *, export: bool) -> None:
        """The table, ``results.json``, the plots and the exported networks."""
        records = {
            method: [r for seed in seeds if (r := self.finished(seed, method)) is not None]
            for method in methods
        }
        print(f"\n{_table(records, self.sparsities)}")
        report.write_results(
            self.out / "results.json",
            recipe=RECIPE,
            config={**self.config, "seeds": list(seeds)},
            environment=self.environment,
            metrics=_metrics(records),
        )
        sparsify_figures.accuracies(self.out / "accuracy.png", records)
        if "fip" in methods:
            names = _prunable(self.network, self.settings)
            sparsest = [load_file(self.file(s, "fip", self.sparsities[-1])) for s in seeds]
            sparsify_figures.layers(self.out / "layers.png", sparsest, names)
            first = self.folder(seeds[0])
            sparsify_figures.weight_space(
                self.out / "weights.png",
                load_file(first / "path.safetensors")["path"],
                stages=len(self.sparsities),
                seed=seeds[0],
            )
        if export:
            for method in methods:
                for sparsity in self.sparsities:
                    source = self.file(seeds[0], method, sparsity)
                    sizes = sparse_export.export(
                        load_file(source),
                        _prunable(self.network, self.settings),
                        self.out / "export" / source.stem,
                    )
                    print(f"exported {self.out / 'export' / source.stem}: {sizes}")
        print(f"results.json, the networks and the plots are in {self.out}")


def _on(bar: Any) -> Callable[[int, str], None]:
    def progress(steps: int, text: str) -> None:
        bar.update(steps)
        bar.set_postfix_str(text, refresh=False)

    return progress


def _prunable(network: Network, settings: Settings) -> tuple[str, ...]:
    return SparseProjection(network.build(), 0.0, keep=settings.keep).names


def _line(seed: int, method: str, dense: float, networks: Sequence[SparseNetwork]) -> str:
    found = ", ".join(f"{n.wanted:.4g}: {n.accuracy:.2f}" for n in networks)
    return f"seed {seed}, {method}: dense {dense:.2f}; {found}; {networks[-1].seconds:.0f} s"


def _metrics(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What ``results.json`` holds: the path's networks (the sparsest one's numbers on top), baselines below."""
    summaries = {method: _summary(runs) for method, runs in records.items()}
    first = next(iter(records.values()))
    dense = [run["dense_accuracy"] for run in first]
    metrics: dict[str, Any] = {
        "dense_accuracy": _mean(dense),
        "dense_accuracy_deviation": _std(dense),
    }
    if "fip" in summaries:
        path = summaries.pop("fip")
        metrics |= path[-1]
        metrics["networks"] = path
    metrics["baselines"] = {
        method: {**networks[-1], "networks": networks} for method, networks in summaries.items()
    }
    return metrics


def _summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds for each sparsity, with the standard deviation of the accuracy."""
    summary = []
    for same in zip(*(run["networks"] for run in runs), strict=True):
        layers = same[0]["per_layer_sparsity"]
        summary.append(
            {
                **{key: same[0][key] for key in ("sparsity", "nonzero", "total")},
                "accuracy": _mean([n["accuracy"] for n in same]),
                "accuracy_deviation": _std([n["accuracy"] for n in same]),
                "accuracies": [n["accuracy"] for n in same],
                "agreement": _mean([n["agreement"] for n in same]),
                "seconds": _mean([n["seconds"] for n in same]),
                "per_layer_sparsity": {
                    layer: _mean([n["per_layer_sparsity"][layer] for n in same]) for layer in layers
                },
            }
        )
    return summary


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _table(records: Mapping[str, Sequence[Mapping[str, Any]]], sparsities: Sequence[float]) -> str:
    """Accuracy by sparsity, one column a method; the seconds are those to the last network."""
    summaries = {method: _summary(runs) for method, runs in records.items()}
    path = next(iter(summaries.values()))

    def cell(entry: Mapping[str, Any]) -> str:
        deviation = entry["accuracy_deviation"]
        return f"{entry['accuracy']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")

    total = path[0]["total"]
    rows = [[f"sparsity of {total:,} weights", *(METHODS[m].title for m in summaries)]]
    for k in range(len(sparsities)):
        share = f"{path[k]['sparsity']:.2%} ({path[k]['nonzero']:,} left)"
        rows.append([share, *(cell(networks[k]) for networks in summaries.values())])
    rows.append(["seconds", *(f"{networks[-1]['seconds']:.1f}" for networks in summaries.values())])
    runs = next(iter(records.values()))
    dense = cell(
        {
            "accuracy": _mean([r["dense_accuracy"] for r in runs]),
            "accuracy_deviation": _std([r["dense_accuracy"] for r in runs]),
        }
    )
    return f"test accuracy (%); dense network {dense}\n{report.aligned(rows)}"


def _network_of(parser: argparse.ArgumentParser, data: str | None) -> str:
    if data is None:
        return next(iter(NETWORKS))
    fitting = [name for name, network in NETWORKS.items() if data in network.data]
    if not fitting:
        known = ", ".join(d for network in NETWORKS.values() for d in network.data)
        parser.error(f"argument --data: unknown data set {data!r}: choose from {known}")
    return fitting[0]


def _settings(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, network: Network
) -> tuple[Settings, list[float]]:
    """The network's defaults, and over them what the command line says; checked before anything is loaded."""
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    given["keep"] = tuple(arguments.keep)
    settings = dataclasses.replace(network.settings, **given)
    sparsities = sorted(set(arguments.sparsity or network.sparsities))
    model = network.build()
    for sparsity in sparsities:
        try:
            SparseProjection(model, sparsity, per_layer=settings.per_layer, keep=settings.keep)
        except ValueError as error:
            option, _, message = str(error).partition(": ")
            parser.error(f"argument --{option}: {message}")
    try:
        Solver(products=settings.products, max_products=settings.max_products)
    except ValueError as error:
        parser.error(f"argument --{error}")
    return settings, sparsities


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Take weights out of a trained network while it keeps its function.",
        epilog=f"Defaults in brackets are those for {' / '.join(NETWORKS)}.",
    )
    what = parser.add_argument_group("network and data")
    what.add_argument("--network", choices=list(NETWORKS), help="[that of --data, else digits-mlp]")
    what.add_argument(
        "--data", metavar="NAME", help="digits, mnist, fashion-mnist or cifar10 [the network's]"
    )
    add_data_options(what)
    what.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a trained dense network, as safetensors or a torch state dict [trained here]",
    )
    sparse = parser.add_argument_group("what is taken out")
    sparse.add_argument(
        "--sparsity",
        type=number,
        nargs="+",
        metavar="P",
        help="shares of the prunable weights that are to be zero, visited in increasing order "
        + "["
        + " / ".join(" ".join(f"{s:g}" for s in n.sparsities) for n in NETWORKS.values())
        + "]",
    )
    sparse.add_argument(
        "--per-layer",
        action="store_true",
        default=argparse.SUPPRESS,
        help="every layer gets the sparsity by itself",
    )
    sparse.add_argument(
        "--keep", nargs="+", default=[], metavar="LAYER", help="layers that are not pruned"
    )
    where = parser.add_argument_group("run")
    where.add_argument(
        "--method",
        nargs="+",
        choices=[*METHODS, "all"],
        default=list(DEFAULT_METHODS),
        metavar="NAME",
        help=f"{', '.join(METHODS)}, or all [{' '.join(DEFAULT_METHODS)}]",
    )
    add_run_options(where, RECIPE)
    where.add_argument(
        "--export",
        action="store_true",
        help="also write weights, masks and a compressed form of the networks of the first seed",
    )

    def setting(option: str, help: str, **keywords: Any) -> None:
        name = option.removeprefix("--").replace("-", "_")
        defaults = [getattr(n.settings, name) for n in NETWORKS.values()]
        shown = " / ".join(
            {None: "all", True: "yes", False: "no"}.get(d, f"{d}")
            if d is None or isinstance(d, bool)
            else f"{d:g}"
            if isinstance(d, float)
            else f"{d}"
            for d in defaults
        )
        group.add_argument(option, default=argparse.SUPPRESS, help=f"{help} [{shown}]", **keywords)

    count = {"type": whole(1), "metavar": "N"}
    rate = {"type": positive, "metavar": "X"}
    switch = {"action": argparse.BooleanOptionalAction}
    group = parser.add_argument_group("all methods")
    setting("--epochs", "epochs for each sparsity on the path", **count)
    setting("--baseline-epochs", "epochs for each sparsity in the baselines", **count)
    setting("--batch-size", "inputs of a step", **count)
    setting("--baseline-lr", "Adam's highest learning rate in the baselines", **rate)
    setting("--mask-every", "steps between two choices of the weights to keep", **count)
    setting(
        "--anchors",
        "training inputs to prune with, or none for all",
        type=or_none(whole(1)),
        metavar="N",
    )
    setting(
        "--augment",
        "whose inputs are shifted (and flipped): nobody's, those that go with labels, or all",
        choices=["none", "labels", "all"],
    )
    setting("--mirror", "inputs that are not augmented are mirrored, too", **switch)
    setting("--autocast", "minibatches in bfloat16", **switch)
    setting("--temperature", "at which outputs are compared", **rate)
    group = parser.add_argument_group("functionally invariant path")
    setting("--choose", "what the weights to keep are largest in", choices=["metric", "magnitude"])
    setting("--beta", "weight of the distance to the sparse network", **rate)
    setting("--lr", "Adam's highest learning rate for the dense network, with no products", **rate)
    setting(
        "--products",
        "metric products a step: 0, a number, or adaptive",
        type=products,
        metavar="N",
    )
    setting("--max-products", "most products of an adaptive step", **count)
    setting("--eps", "length of a step with products, at the top of its schedule", **rate)
    setting("--probes", "random pullbacks of an estimate of the metric", **count)
    setting("--metric-batch", "inputs of an estimate of the metric", **count)
    setting("--metric-decay", "of the running mean of estimates", type=fraction, metavar="X")
    setting("--labels", "also follow the labels", **switch)
    return parser


if __name__ == "__main__":
    sys.exit(main())
