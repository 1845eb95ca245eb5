"""Make an ensemble from one trained network and attack it: ``python -m recipes.diversity --help``.

From a trained network, paths lead far through weight space on which the function on clean inputs stays: with no
objective (L = 0, as straight as the function allows), with input gradients turned away from the start network's and the
other members', with both in turn, or with outputs that do not follow what fools the start network and the others.
Networks on the way are the ensemble. Other ways to as many networks are run beside it, and all are attacked alike: by
what fools the start network (transfer), each member for itself, and the joint ensemble.

Left in ``--out``: ``results.json``, a safetensors file for each member, and plots: ``attacks.png``, ``weights.png``,
``coherence.png``, ``layers.png`` and ``pictures.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import vgg16_bn
from tqdm import tqdm

from recipes import diversity_figures, report
from recipes.attacks import Joint, Pixels, auto_attack, pgd
from recipes.augment import augmentation
from recipes.data import DATASETS, DataError, Task, load_task
from recipes.ensemble_measures import (
    Votes,
    activation_norms,
    coherence,
    distance,
    diversity_scores,
    percent,
    probabilities,
)
from recipes.ensembles import (
    BASELINES,
    PATHS,
    SPENT,
    WAYS,
    Ensemble,
    Settings,
    build_ensemble,
    steps_of,
    train_network,
)
from recipes.networks import digits_mlp, paper_cnn, vgg_small
from recipes.options import (
    add_data_options,
    add_run_options,
    fraction,
    number,
    or_none,
    positive,
    usable_device,
    whole,
)
from recipes.training import accuracy, steps_an_epoch

RECIPE = "diversity"
PROGRAM = f"python -m recipes.{RECIPE}"
DEFAULT_WAYS = ("withstand", "independent")
SCORED = 1000  # test images of which activations and input gradients are compared
SHOWN = 6  # attacked images drawn
BINS = 20  # of the histogram of coherence


@dataclass(frozen=True)
class Attacks:
    """How ensembles are attacked; every field is an option of the command line.

    Attributes:
        attack_eps: Largest changes of a pixel, for transfer.
        table_eps: The one at which members and the joint ensemble are attacked themselves.
        attack_images: The first test images, attacked for transfer.
        white_box_images: As many of them for attacks on members and on the joint ensemble.
        auto_attack_images: As many of them for AutoAttack; 0 leaves it out.
        attack_steps: Of each attack.
        attack_restarts: Of each attack.
    """

    attack_eps: tuple[float, ...]
    table_eps: float
    attack_images: int = 1000
    white_box_images: int = 500
    auto_attack_images: int = 100
    attack_steps: int = 20
    attack_restarts: int = 1


@dataclass(frozen=True)
class Network:
    """What ensembles are made of here."""

    build: Callable[[], nn.Module]
    data: str
    settings: Settings
    attacks: Attacks
    augment: bool = False


_CIFAR = Network(
    vgg_small,
    "cifar10",
    Settings(
        members=5,
        epochs=8,
        batch_size=128,
        autocast=True,
        away=1800,
        between=150,
        between_share=1 / 3,
        withstand_beta=0.08,
        withstand_eps=6 / 255,
        batch_statistics=True,
        noise=4 / 255,
    ),
    Attacks((2 / 255, 4 / 255, 6 / 255, 8 / 255, 12 / 255), table_eps=4 / 255),
    augment=True,
)
NETWORKS = {
    "digits-mlp": Network(
        digits_mlp,
        "digits",
        Settings(
            members=4,
            epochs=30,
            batch_size=32,
            anchor_batch=256,
            straight_eps=0.3,
            eps=0.5,
            away=400,
            between=50,
            beta=0.01,
            withstand_beta=5.0,
            withstand_eps=0.2,
            noise=0.15,
            distillation_lr=3e-3,
            cycle_epochs=4.0,
            cycle_lr=0.1,
        ),
        Attacks((0.05, 0.1, 0.15, 0.2), table_eps=0.1, attack_images=450, white_box_images=200),
    ),
    "cnn": Network(
        lambda: paper_cnn(10),
        "fashion-mnist",
        Settings(
            members=5,
            epochs=8,
            batch_size=100,
            autocast=True,
            noise=0.06,
        ),
        Attacks((0.02, 0.04, 0.06, 0.08, 0.1), table_eps=0.06),
    ),
    "vgg-small": _CIFAR,
    "vgg16": dataclasses.replace(
        _CIFAR,
        build=lambda: vgg16_bn(num_classes=10),
        settings=dataclasses.replace(_CIFAR.settings, members=10, epochs=60),
    ),
}


class _Experiment:
    """The runs of all seeds and ways on one network, and the files that they leave."""

    def __init__(
        self,
        network: Network,
        task: Task,
        settings: Settings,
        attacks: Attacks,
        checkpoint: Path | None,
        config: Mapping[str, Any],
        out: Path,
    ) -> None:
        self.network, self.task, self.settings, self.attacks = network, task, settings, attacks
        self.checkpoint, self.config, self.out = checkpoint, config, out
        self.info = DATASETS[task.name]
        self.augment = augmentation(task.name) if network.augment else None
        self.images = self.info.pixels(task.test_inputs)
        self.labels = task.test_labels

    def folder(self, seed: int) -> Path:
        return self.out / f"seed-{seed}"

    def finished(self, seed: int, way: str) -> dict[str, Any] | None:
        """The record of a finished run."""
        return report.read_json(self.folder(seed) / f"{way}.json")

    def check_resumable(self, seeds: Sequence[int]) -> None:
        """Refuses finished runs of another configuration.

        Raises:
            DataError: With the differences.
        """
        for seed in seeds:
            for way in ("start", *WAYS):
                record = self.finished(seed, way)
                different = report.differences(record["config"], self.config) if record else ""
                if different:
                    raise DataError(
                        f"--resume: {self.folder(seed)}/{way}.json is of another configuration "
                        f"({different}); choose another --out"
                    )

    # --- one seed -------------------------------------------------------------------------------------

    def run(self, seed: int, ways: Sequence[str], *, resume: bool, progress: bool) -> None:
        """All ways of one seed, from one start network."""
        self.folder(seed).mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in ("start", *WAYS):
                (self.folder(seed) / f"{name}.json").unlink(missing_ok=True)
                (self.folder(seed) / name / SPENT).unlink(missing_ok=True)
        if resume and all(self.finished(seed, name) for name in ("start", *ways)):
            return
        start = self._start(seed, progress=progress)
        attacked = self._transfer(start, seed)
        for way in ways:
            if self.finished(seed, way):
                continue
            ensemble = self._build(way, start, seed, resume=resume, progress=progress)
            record = {"config": self.config, **self._measure(ensemble, start, attacked, seed)}
            report.write_json(self.folder(seed) / f"{way}.json", record)
            print(_line(seed, way, record), flush=True)

    def _start(self, seed: int, *, progress: bool) -> nn.Module:
        """The start network: the checkpoint's, what an earlier run trained, or one trained now."""
        file = self.folder(seed) / "start.safetensors"
        model = self.network.build().to(self.images.device)
        # The layout that convolutions on a CPU prefer; all that is made from the start network keeps it.
        model = model.to(memory_format=torch.channels_last)
        if self.finished(seed, "start"):
            model.load_state_dict(load_file(file))
            return model.eval()
        seconds = 0.0
        if self.checkpoint is not None:
            model.load_state_dict(load_file(self.checkpoint))
            model.eval()
        else:
            steps = self.settings.epochs * steps_an_epoch(self.task, self.settings.batch_size)
            with _bar(f"seed {seed}, start", steps, progress) as (_, show):
                begun = time.perf_counter()
                model = train_network(
                    self.network.build,
                    self.task,
                    self.settings,
                    augment=self.augment,
                    seed=seed,
                    progress=show,
                )
                seconds = time.perf_counter() - begun
        report.save_tensors(file, model.state_dict())
        clean = accuracy(model, self.task.test_inputs, self.labels, batch_size=500)
        record = {"config": self.config, "accuracy": clean, "seconds": seconds}
        (self.folder(seed) / "attacked.safetensors").unlink(missing_ok=True)
        report.write_json(self.folder(seed) / "start.json", record)
        return model

    def _transfer(self, start: nn.Module, seed: int) -> dict[float, Tensor]:
        """What fools the start network, for each size of the attack; made once."""
        file = self.folder(seed) / "attacked.safetensors"
        if file.exists():
            found = load_file(file)
            return {eps: found[f"{eps:.6g}"].to(self.images) for eps in self.attacks.attack_eps}
        count = self.attacks.attack_images
        images, labels = self.images[:count], self.labels[:count]
        made = {eps: self._pgd(start, images, labels, eps, seed) for eps in self.attacks.attack_eps}
        report.save_tensors(file, {f"{eps:.6g}": x for eps, x in made.items()})
        fooled = {
            f"{eps:.6g}": percent(self._classes(start, x) == labels) for eps, x in made.items()
        }
        record = self.finished(seed, "start")
        assert record is not None
        report.write_json(self.folder(seed) / "start.json", {**record, "transfer": fooled})
        return made

    def _build(
        self, way: str, start: nn.Module, seed: int, *, resume: bool, progress: bool
    ) -> Ensemble:
        walked = [r for w in PATHS if (r := self.finished(seed, w)) is not None]
        if way == "noise" and not walked:
            raise DataError(
                "noise is as long as a path: run a path with it, or before it with --resume"
            )
        steps = steps_of(way, self.task, self.settings)
        with _bar(f"seed {seed}, {WAYS[way].title}", steps, progress) as (_, show):
            return build_ensemble(
                way,
                start,
                self.network.build,
                self.task,
                self.settings,
                folder=self.folder(seed) / way,
                augment=self.augment,
                distances=walked[-1]["distances"] if walked else (),
                seed=seed,
                resume=resume,
                progress=show,
            )

    def _measure(
        self, ensemble: Ensemble, start: nn.Module, attacked: Mapping[float, Tensor], seed: int
    ) -> dict[str, Any]:
        """Everything about one ensemble; its members are in memory one at a time, but for the attack on them all."""
        attacks = self.attacks
        some = self.labels[: attacks.attack_images]
        few = attacks.white_box_images
        clean = Votes(self.labels)
        transfer = {eps: Votes(some) for eps in attacked}
        alone, norms, cosines, distances = (
            list[float](),
            list[Tensor](),
            list[Tensor](),
            list[float](),
        )
        for member in ensemble:
            pixels = Pixels(member, self.info)
            clean.add(probabilities(pixels, self.images))
            for eps, images in attacked.items():
                transfer[eps].add(probabilities(pixels, images))
            found = self._pgd(member, self.images[:few], self.labels[:few], attacks.table_eps, seed)
            alone.append(percent(self._classes(member, found) == self.labels[:few]))
            norms.append(activation_norms(pixels, self.images[:SCORED]))
            cosines.append(
                coherence(
                    pixels,
                    Pixels(start, self.info),
                    self.images[:SCORED],
                    self.labels[:SCORED],
                )
            )
            distances.append(distance(member, start))
        joint = Joint([Pixels(member, self.info) for member in ensemble]).eval()
        white = pgd(
            joint,
            self.images[:few],
            self.labels[:few],
            attacks.table_eps,
            steps=attacks.attack_steps,
            restarts=attacks.attack_restarts,
            seed=seed,
        )
        record: dict[str, Any] = {
            "clean": {"joint": clean.joint, "mean": clean.mean, "members": clean.accuracies},
            "transfer": {
                f"{eps:.6g}": {"joint": v.joint, "mean": v.mean, "members": v.accuracies}
                for eps, v in transfer.items()
            },
            "white_box_members": alone,
            "white_box_joint": percent(probabilities(joint, white).argmax(1) == self.labels[:few]),
            "auto_attack_joint": None,
            "disagreement": clean.disagreement,
            "diversity_by_layer": diversity_scores(norms),
            "coherence": float(torch.cat(cosines).mean()),
            "coherence_histogram": torch.cat(cosines).float().histc(BINS, -1, 1).tolist(),
            "distances": distances,
            "lengths": ensemble.lengths,
            "seconds": ensemble.seconds,
            "shown": {
                "clean": self._joint_classes(joint, self.images[:SHOWN]),
                "attacked": self._joint_classes(joint, attacked[attacks.table_eps][:SHOWN]),
            },
        }
        if attacks.auto_attack_images:
            images = self.images[: attacks.auto_attack_images]
            labels = self.labels[: attacks.auto_attack_images]
            found = auto_attack(
                joint, images, labels, attacks.table_eps, classes=self.task.classes, seed=seed
            )
            record["auto_attack_joint"] = percent(probabilities(joint, found).argmax(1) == labels)
        return record

    def _pgd(
        self, network: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int
    ) -> Tensor:
        return pgd(
            Pixels(network, self.info).eval(),
            images,
            labels,
            eps,
            steps=self.attacks.attack_steps,
            restarts=self.attacks.attack_restarts,
            seed=seed,
        )

    def _classes(self, network: nn.Module, images: Tensor) -> Tensor:
        return probabilities(Pixels(network, self.info), images).argmax(dim=1)

    @staticmethod
    def _joint_classes(joint: nn.Module, images: Tensor) -> list[int]:
        found: list[int] = probabilities(joint, images).argmax(dim=1).tolist()
        return found

    # --- what is left ---------------------------------------------------------------------------------

    def report(self, seeds: Sequence[int], ways: Sequence[str], device: torch.device) -> None:
        """The table, ``results.json`` and the plots."""
        records = {way: [_known(self.finished(seed, way)) for seed in seeds] for way in ways}
        starts = [_known(self.finished(seed, "start")) for seed in seeds]
        print(f"\n{_table(records, starts, self.attacks)}")
        report.write_results(
            self.out / "results.json",
            recipe=RECIPE,
            config={**self.config, "seeds": list(seeds)},
            environment=report.environment(device),
            metrics=_metrics(records, starts),
        )
        first = self.folder(seeds[0])
        diversity_figures.attacks(self.out / "attacks.png", records, starts)
        diversity_figures.coherence(self.out / "coherence.png", records)
        diversity_figures.layers(self.out / "layers.png", records)
        names = {
            way: [first / way / f"member-{k:03d}.safetensors" for k in range(self.settings.members)]
            for way in ways
        }
        diversity_figures.weight_space(self.out / "weights.png", first / "start.safetensors", names)
        attacked = load_file(first / "attacked.safetensors")[f"{self.attacks.table_eps:.6g}"]
        start = self.network.build()
        start.load_state_dict(load_file(first / "start.safetensors"))
        start.eval()
        shown = attacked[:SHOWN].to(self.images)
        diversity_figures.pictures(
            self.out / "pictures.png",
            self.images[:SHOWN].cpu(),
            attacked[:SHOWN],
            {
                "start": {
                    "clean": self._classes(start.to(shown.device), self.images[:SHOWN]).tolist(),
                    "attacked": self._classes(start, shown).tolist(),
                },
                **{way: found[0]["shown"] for way, found in records.items()},
            },
        )
        print(f"results.json, the members and the plots are in {self.out}")


class _bar:
    """A progress bar and the function that moves it."""

    def __init__(self, title: str, total: int, progress: bool) -> None:
        self.bar = tqdm(total=total, desc=title, unit="step", disable=not progress)

    def __enter__(self) -> tuple[Any, Callable[[int, str], None]]:
        def show(steps: int, text: str) -> None:
            self.bar.update(steps)
            self.bar.set_postfix_str(text, refresh=False)

        return self.bar, show

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def _known(record: dict[str, Any] | None) -> dict[str, Any]:
    assert record is not None
    return record


def _line(seed: int, way: str, record: Mapping[str, Any]) -> str:
    transfer = ", ".join(
        f"{eps}: {v['mean']:.1f} / {v['joint']:.1f}" for eps, v in record["transfer"].items()
    )
    clean = record["clean"]
    return (
        f"seed {seed}, {WAYS[way].title}: clean {clean['mean']:.2f} / {clean['joint']:.2f} "
        f"(least {min(clean['members']):.2f}), transfer {transfer}, {record['seconds']:.0f} s"
    )


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one run that are averaged over seeds."""
    found = {
        "clean_joint": record["clean"]["joint"],
        "clean_mean": record["clean"]["mean"],
        "clean_least": min(record["clean"]["members"]),
        "white_box_mean": sum(record["white_box_members"]) / len(record["white_box_members"]),
        "white_box_joint": record["white_box_joint"],
        "disagreement": record["disagreement"],
        "coherence": record["coherence"],
        "diversity": sum(record["diversity_by_layer"]) / len(record["diversity_by_layer"]),
        "distance": sum(record["distances"]) / len(record["distances"]),
        "seconds": record["seconds"],
    }
    if record["auto_attack_joint"] is not None:
        found["auto_attack_joint"] = record["auto_attack_joint"]
    for eps, values in record["transfer"].items():
        found[f"transfer_mean_{eps}"] = values["mean"]
        found[f"transfer_joint_{eps}"] = values["joint"]
    return found


def _metrics(
    records: Mapping[str, Sequence[Mapping[str, Any]]], starts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    ways: dict[str, Any] = {}
    for way, runs in records.items():
        scalars = [_scalars(run) for run in runs]
        ways[way] = {
            **report.means(scalars),
            "diversity_by_layer": [
                sum(v) / len(v) for v in zip(*(r["diversity_by_layer"] for r in runs), strict=True)
            ],
        }
        if len(runs) > 1:
            ways[way]["deviations"] = report.deviations(scalars)
            ways[way]["intervals_95"] = report.intervals(scalars)
    start = {
        "accuracy": sum(s["accuracy"] for s in starts) / len(starts),
        "transfer": {
            eps: sum(s["transfer"][eps] for s in starts) / len(starts)
            for eps in starts[0]["transfer"]
        },
    }
    return {"start": start, "ensembles": ways}


def _table(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    starts: Sequence[Mapping[str, Any]],
    attacks: Attacks,
) -> str:
    table_eps = f"{attacks.table_eps:.6g}"
    rows = [
        ("clean_joint", "clean, joint (%)", ".2f"),
        ("clean_mean", "clean, members (%)", ".2f"),
        ("clean_least", "clean, least member (%)", ".2f"),
    ]
    for eps in starts[0]["transfer"]:
        rows.append((f"transfer_mean_{eps}", f"transfer at {float(eps):.3g}, members (%)", ".1f"))
        rows.append((f"transfer_joint_{eps}", f"transfer at {float(eps):.3g}, joint (%)", ".1f"))
    rows += [
        ("white_box_mean", f"attacked itself at {float(table_eps):.3g}, members (%)", ".1f"),
        ("white_box_joint", f"attacked itself at {float(table_eps):.3g}, joint (%)", ".1f"),
        ("auto_attack_joint", f"AutoAttack at {float(table_eps):.3g}, joint (%)", ".1f"),
        ("disagreement", "disagreement (%)", ".2f"),
        ("coherence", "coherence with the start", ".3f"),
        ("diversity", "diversity score, mean of layers", ".3g"),
        ("distance", "distance from the start", ".3g"),
        ("seconds", "seconds", ".1f"),
    ]
    body = []
    for key, label, form in rows:
        cells = []
        for runs in records.values():
            values = [s[key] for s in map(_scalars, runs) if key in s]
            cells.append(report.mean_and_deviation(values, form) if values else "–")
        body.append([label, *cells])
    transfer = ", ".join(
        f"{float(eps):.3g}: {sum(s['transfer'][eps] for s in starts) / len(starts):.1f}"
        for eps in starts[0]["transfer"]
    )
    clean = report.mean_and_deviation([s["accuracy"] for s in starts], ".2f")
    return f"start network: clean {clean} %, attacked at {transfer} %\n" + report.aligned(
        [["", *(WAYS[way].title for way in records)], *body]
    )


# --- the command line -----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line; returns the exit status."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print(
            f"\n{PROGRAM}: interrupted; go on with --resume, which keeps the ensembles that were finished",
            file=sys.stderr,
        )
        return 130


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    name = arguments.network or next(
        key for key, network in NETWORKS.items() if network.data == (arguments.data or "digits")
    )
    network = NETWORKS[name]
    if arguments.data not in (None, network.data):
        parser.error(f"argument --data: {name} takes {network.data}, got {arguments.data!r}")
    settings, attacks = _settings(parser, arguments, network)
    ways = _ways(parser, arguments)
    device = usable_device(parser, arguments.device)
    try:
        import torchattacks  # noqa: F401
    except ImportError:
        parser.error(
            "attacks need torchattacks, which is not installed: pip install 'fipoptim[recipes]'"
        )
    try:
        task = load_task(network.data, data_root=arguments.data_root, download=arguments.download)
        if arguments.validation > 0:
            task = task.held_out(arguments.validation)
        if arguments.checkpoint is not None:
            network.build().load_state_dict(load_file(arguments.checkpoint))
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (OSError, RuntimeError) as error:
        parser.error(
            f"argument --checkpoint: {arguments.checkpoint} does not fit {name}: {str(error).splitlines()[0]}"
        )
    if settings.anchors is not None and settings.anchors > len(task.train_inputs):
        parser.error(
            f"argument --anchors: {settings.anchors} is more than the {len(task.train_inputs)} "
            f"training inputs of {network.data}"
        )
    config = {
        "network": name,
        "data": network.data,
        "checkpoint": None if arguments.checkpoint is None else arguments.checkpoint.name,
        "validation": arguments.validation,
        **dataclasses.asdict(settings),
        **dataclasses.asdict(attacks),
    }
    experiment = _Experiment(
        network,
        task.to(device),
        settings,
        attacks,
        arguments.checkpoint,
        json.loads(json.dumps(config)),  # as it is read back
        arguments.out,
    )
    seeds: list[int] = arguments.seeds or [arguments.seed]
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.resume:
            experiment.check_resumable(seeds)
        for seed in seeds:
            experiment.run(seed, ways, resume=arguments.resume, progress=arguments.progress)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {arguments.out}: {error.strerror}")
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    experiment.report(seeds, ways, device)
    return 0


def _ways(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """The ways asked for, paths first: weight noise is as long as they are."""
    asked = set(arguments.objective)
    asked |= set(BASELINES) if "all" in arguments.baseline else set(arguments.baseline)
    if not asked:
        parser.error("name an --objective or a --baseline")
    walked = arguments.resume and any(any(arguments.out.glob(f"seed-*/{p}.json")) for p in PATHS)
    if "noise" in asked and not walked and not asked & set(PATHS):
        parser.error("argument --baseline: noise is as long as a path: name an --objective too")
    return [way for way in WAYS if way in asked]


def _settings(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, network: Network
) -> tuple[Settings, Attacks]:
    """The network's defaults, and over them what the command line says; checked before anything is loaded."""

    def given(kind: type[Any]) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(kind)}
        return {key: value for key, value in vars(arguments).items() if key in names}

    settings = dataclasses.replace(network.settings, **given(Settings))
    attacks = dataclasses.replace(network.attacks, **given(Attacks))
    eps = tuple(sorted({*attacks.attack_eps, attacks.table_eps}))
    attacks = dataclasses.replace(attacks, attack_eps=eps)
    for value in eps:
        if not 0 <= value <= 1:
            parser.error(
                f"argument --attack-eps: {value:g} is out of range: give a share of the pixels' range, 0 to 1"
            )
    return settings, attacks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Make an ensemble from one trained network and attack it.",
        epilog=f"Defaults in brackets are those for {' / '.join(NETWORKS)}.",
    )
    what = parser.add_argument_group("network and data")
    what.add_argument("--network", choices=list(NETWORKS), help="[that of --data, else digits-mlp]")
    known = list(dict.fromkeys(network.data for network in NETWORKS.values()))
    what.add_argument("--data", choices=known, help="[the network's]")
    add_data_options(what)
    what.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="a trained start network [trained here]"
    )
    where = parser.add_argument_group("run")
    where.add_argument(
        "--objective",
        nargs="*",
        choices=PATHS,
        default=[way for way in DEFAULT_WAYS if way in PATHS],
        metavar="NAME",
        help=f"what moves the path: {', '.join(PATHS)}, or several [withstand]",
    )
    where.add_argument(
        "--baseline",
        nargs="*",
        choices=[*BASELINES, "all"],
        default=[way for way in DEFAULT_WAYS if way in BASELINES],
        metavar="NAME",
        help=f"other ways: {', '.join(BASELINES)}, all, or nothing [independent]",
    )
    add_run_options(where, RECIPE)

    def setting(option: str, help: str, **keywords: Any) -> None:
        name = option.removeprefix("--").replace("-", "_")
        defaults = [
            getattr(n.settings if hasattr(n.settings, name) else n.attacks, name)
            for n in NETWORKS.values()
        ]
        shown = " / ".join(
            "all"
            if d is None
            else " ".join(f"{e:.3g}" for e in d)
            if isinstance(d, tuple)
            else f"{d:.3g}"
            if isinstance(d, float)
            else f"{d}"
            for d in defaults
        )
        group.add_argument(option, default=argparse.SUPPRESS, help=f"{help} [{shown}]", **keywords)

    count = {"type": whole(1), "metavar": "N"}
    rate = {"type": positive, "metavar": "X"}
    group = parser.add_argument_group("all ways")
    setting("--members", "networks of an ensemble", type=whole(2), metavar="N")
    setting("--epochs", "epochs of a network trained from scratch", **count)
    setting("--batch-size", "inputs of a training step", **count)
    setting("--lr", "Adam's highest learning rate in training from scratch", **rate)
    group = parser.add_argument_group("functionally invariant paths")
    setting(
        "--anchors",
        "training inputs that hold the function, or none for all",
        type=or_none(whole(1)),
        metavar="N",
    )
    setting("--anchor-batch", "of them in each step", **count)
    setting("--output-space", "in which it is held", choices=["logits", "probabilities"])
    setting(
        "--batch-statistics",
        "batch norm by each batch's statistics on the way, measured anew for each member",
        action=argparse.BooleanOptionalAction,
    )
    setting("--straight-eps", "length of a step without objective", **rate)
    setting("--straight-away", "steps of that, then those of --away, to the first member", **count)
    setting("--straight-between", "steps of that from one member to the next", **count)
    setting("--straight-products", "metric products of each", **count)
    setting("--eps", "length of a step on an objective, or back to the function", **rate)
    setting("--away", "steps of that to the first member", **count)
    setting("--between", "steps of that from one member to the next", **count)
    setting("--between-share", "of their length, or of the learning rate, there", **rate)
    setting("--beta", "weight of the likeness of input gradients", **rate)
    setting("--withstand-beta", "weight of what attacks change", **rate)
    setting(
        "--withstand-eps", "largest change of a pixel by these attacks", type=fraction, metavar="X"
    )
    setting("--objective-batch", "inputs of an objective, each step", **count)
    setting(
        "--noise",
        "largest change of a pixel by noise where gradients are compared",
        type=fraction,
        metavar="X",
    )
    setting("--others", "earlier members to differ from, at most", type=whole(0), metavar="N")
    group = parser.add_argument_group("other ways")
    setting("--distillation-lr", "Adam's highest learning rate on the same objectives", **rate)
    setting("--cycle-epochs", "epochs of a cycle of fast geometric ensembling", **rate)
    setting("--cycle-lr", "its highest learning rate", **rate)
    group = parser.add_argument_group("attacks")
    setting("--attack-eps", "largest changes of a pixel", type=number, nargs="+", metavar="X")
    setting(
        "--table-eps", "the one of attacks on the ensembles themselves", type=number, metavar="X"
    )
    setting("--attack-images", "test images attacked on the start network", **count)
    setting("--white-box-images", "test images attacked on each ensemble", **count)
    setting(
        "--auto-attack-images",
        "test images for AutoAttack; 0 leaves it out",
        type=whole(0),
        metavar="N",
    )
    setting("--attack-steps", "steps of an attack", **count)
    setting("--attack-restarts", "random starts of an attack", **count)
    return parser


if __name__ == "__main__":
    sys.exit(main())
