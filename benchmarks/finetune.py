"""What is learnt at which drift: ``python -m benchmarks.finetune --adapters lora none --seeds 0 1 2``.

MiniLM-L6 learns ten kinds of text, and its embeddings of other texts are to stay (``recipes.finetune``). One run of the
path is told a budget. Beside it stand eight runs of distillation, each of which takes as long, L2-SP, plain
fine-tuning, and the straight line from the start to it (WiSE-FT). The best run of the sweep is the one with the lowest
NLL on the test texts themselves, which favours distillation. The path is ahead if it has no higher NLL at no more
drift. The front of all other networks is printed beside it.

Times are CPU times. All runs of a seed take turns, and the one that has used the least time is always the next, so that
a slow phase of the machine slows all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from benchmarks import record
from recipes.common import report, stored
from recipes.common.data import DataError
from recipes.common.options import SEED, Distinct, positive
from recipes.common.recipe_settings import option_kinds
from recipes.finetune.measures import Measures
from recipes.finetune.methods import METHODS
from recipes.finetune.methods.distillation import DistillationOptions
from recipes.finetune.methods.interpolation import InterpolationOptions
from recipes.finetune.methods.l2sp import L2SPOptions
from recipes.finetune.methods.method import Run
from recipes.finetune.methods.path import PathOptions
from recipes.finetune.methods.plain import PlainOptions
from recipes.finetune.networks import MINILM
from recipes.finetune.settings import FinetuneSettings
from recipes.finetune.tables import named
from recipes.finetune.text_problem import EncoderProblem
from recipes.finetune.texts import FORTUNES

Point = dict[str, Any]

SECONDS = 30.0
# The sweep of distillation is eight runs, each rate with each weight.
ADAPTERS: dict[str, tuple[Any, ...]] = {
    "lora": (
        PathOptions(max_drift=(0.02,), eps=0.2),
        DistillationOptions(
            distillation_lr=(1e-3, 3e-3), distillation_weight=(1.0, 3.0, 10.0, 30.0)
        ),
        PlainOptions(plain_lr=(3e-3,)),
        L2SPOptions(l2sp_lr=(3e-3,), l2sp_weight=(0.1,)),
    ),
    "none": (
        PathOptions(max_drift=(0.02,), eps=0.1),
        DistillationOptions(
            distillation_lr=(3e-5, 1e-4), distillation_weight=(1.0, 3.0, 10.0, 30.0)
        ),
        PlainOptions(plain_lr=(1e-4,)),
        L2SPOptions(l2sp_lr=(1e-4,), l2sp_weight=(0.1,)),
    ),
}
LINE = InterpolationOptions(shares=(0.1, 0.2, 0.35, 0.5, 0.7))
KEYS = ("nll", "accuracy", "drift", "kept")


def settings_of(adapter: str, seconds: float) -> FinetuneSettings:
    """The settings of all runs with an adapter."""
    settings = FinetuneSettings(seconds=seconds, method_options=(*ADAPTERS[adapter], LINE))
    return settings.completed(option_kinds(METHODS.values()))


def measure(
    problem: EncoderProblem, settings: FinetuneSettings, *, seed: int, progress: bool
) -> dict[str, Any]:
    """Measures one seed.

    Args:
        problem: The network and its texts.
        settings: The settings.
        seed: The seed of everything drawn.
        progress: Whether to show a progress bar.

    Returns:
        ``start``, the point of the pretrained network, and for each method its points.
    """
    case, unseen = problem.start(seed)
    measures = Measures(case, unseen)
    runs = [
        (name, Run(method, case, settings, choice, seed=seed))
        for name, method in METHODS.items()
        if name != "interpolation"  # on the line to plain fine-tuning, which runs
        for choice in method.choices(settings)
    ]
    unfinished = [run for _, run in runs]
    with tqdm(total=len(runs), desc=f"seed {seed}", disable=not progress) as bar:
        while unfinished:
            behind = min(unfinished, key=lambda run: run.seconds)
            behind.advance()
            if behind.finished:
                unfinished.remove(behind)
                bar.update()
    found: dict[str, Any] = {
        "start": of_network(measures.point(case.start)),
        **{name: list[Point]() for name in METHODS},
    }
    for name, run in runs:
        of_run = {
            "choice": dict(run.choice),
            "steps": run.steps,
            "seconds": rounded(run.seconds),
            "account": run.account,
        }
        found[name].append({**of_run, **of_network(measures.point(run.model))})
        if name == "plain":
            for choice, network in METHODS["interpolation"].networks(run, case, settings):
                point = of_network(measures.point(network))
                found["interpolation"].append({**of_run, "choice": dict(choice), **point})
    return found


def of_network(point: Point) -> Point:
    """The figures of a network that the file keeps."""
    overall = point["certificate"]["overall"]
    return {
        **{key: rounded(point[key]) for key in KEYS},
        "drift_at_most": rounded(overall["drift"]["bound"]),
        "flips_at_most": rounded(overall["flips"]["bound"]),
    }


def rounded(value: float) -> float:
    """A value to four significant digits."""
    return float(f"{value:.4g}")


def best_of_sweep(found: dict[str, Any]) -> Point:
    """The run of distillation with the lowest NLL on the test texts."""
    best: Point = min(found["distillation"], key=lambda p: p["nll"])
    return best


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in NLL and drift, by drift."""
    return [
        p
        for p in sorted(points, key=lambda p: (p["drift"], p["nll"]))
        if not any(
            q["drift"] <= p["drift"]
            and q["nll"] <= p["nll"]
            and q is not p
            and (q["drift"], q["nll"]) != (p["drift"], p["nll"])
            for q in points
        )
    ]


def table(by_seed: dict[str, Any]) -> str:
    """Every network, as means ± standard deviations over seeds; then the path beside the front, seed by seed."""
    seeds = list(by_seed.values())
    rows = [["", "NLL", "accuracy (%)", "drift", "at most", "kept (%)", "steps", "seconds"]]

    def cells(points: Sequence[Point]) -> list[str]:
        forms = {"nll": ".3f", "accuracy": ".1f", "drift": ".4f", "drift_at_most": ".4f"}
        forms |= {"kept": ".1f", "steps": ".3g", "seconds": ".1f"}
        return [
            report.mean_and_deviation([float(p[key]) for p in points], form)
            if all(key in p for p in points)
            else "–"
            for key, form in forms.items()
        ]

    rows.append(["start", *cells([found["start"] for found in seeds])])
    for name in METHODS:
        for points in zip(*(found[name] for found in seeds), strict=True):
            rows.append([named(name, points[0]["choice"]), *cells(points)])
    lines = [report.aligned(rows)]
    for seed, found in by_seed.items():
        best = best_of_sweep(found)
        others = [p for name in METHODS if name != "fip" for p in found[name]]
        for path in found["fip"]:
            beaten = [p for p in others if p["nll"] <= path["nll"] and p["drift"] <= path["drift"]]
            lines.append(
                f"seed {seed}: path with a budget of {path['choice']['max_drift']:g}: NLL {path['nll']:.3f} at "
                f"{path['drift']:.4f}; best NLL of the sweep ({named('', best['choice']).strip()}): {best['nll']:.3f} "
                f"at {best['drift']:.4f}; {len(beaten)} of {len(others)} other networks are no worse in both"
            )
        lines.append(
            f"seed {seed}: the front of all other networks, drift / NLL: "
            + ", ".join(f"{p['drift']:.4f} / {p['nll']:.3f}" for p in front(others))
        )
    return "\n".join(lines)


def draw(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Draws NLL on the test texts against drift on held-out queries: a panel for each adapter, all seeds."""
    figure, axes = plt.subplots(1, len(found), figsize=(4.6 * len(found), 3.8), squeeze=False)
    for axis, (adapter, by_seed) in zip(axes[0], found.items(), strict=True):
        for number, of_seed in enumerate(by_seed.values()):
            for key, style, colour, label in (
                ("interpolation", "-", "#999999", "line to plain fine-tuning"),
                ("distillation", "o", "#d9730d", "distillation, 8 runs"),
                ("l2-sp", "s", "#5f9e4f", "L2-SP"),
                ("plain", "x", "#666666", "plain fine-tuning"),
                ("fip", "D", "#1f5fa8", "one budgeted path"),
            ):
                xy = [(p["drift"], p["nll"]) for p in of_seed[key]]
                axis.plot(
                    *zip(*xy, strict=True),
                    style,
                    color=colour,
                    ms=5,
                    label=label if number == 0 else None,
                )
            axis.axhline(of_seed["start"]["nll"], color="#cccccc", linewidth=0.8, zorder=0)
        axis.set_xscale("log")
        axis.set_title({"lora": "LoRA", "none": "all weights"}[adapter], fontsize=10)
        axis.set_xlabel("drift of held-out embeddings")
        axis.set_ylabel("NLL of new texts (nats; start: grey)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Runs the benchmark for each adapter and seed, prints the figures, and writes the JSON file and the plot."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune",
        description="What a text encoder learns at which drift, beside a sweep of distillation.",
    )
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--seeds", type=SEED, nargs="+", action=Distinct, default=[0])
    parser.add_argument("--seconds", type=positive, default=SECONDS, help="of a run [%(default)g]")
    parser.add_argument(
        "--development",
        action="store_true",
        help="leave the texts that are kept for results alone and measure on others",
    )
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    parser.add_argument(
        "--resume", action="store_true", help="keep the finished seeds of the file --out"
    )
    parser.add_argument(
        "--out", type=Path, default=record.RESULTS / "finetune.json", metavar="FILE"
    )
    arguments = parser.parse_args()
    settings = {a: settings_of(a, arguments.seconds) for a in arguments.adapters}
    found: dict[str, dict[str, Any]] = {name: {} for name in arguments.adapters}
    try:
        problems = {
            adapter: EncoderProblem(
                MINILM,
                adapter,
                FORTUNES,
                None,
                own,
                development=arguments.development,
                device=torch.device("cpu"),
            )
            for adapter, own in settings.items()
        }
        config = {
            adapter: {**problems[adapter].identity, **own.flat()}
            for adapter, own in settings.items()
        }
        earlier = stored.load_record(arguments.out, config) if arguments.resume else None
        if earlier is not None:
            found = earlier["found"]
        for adapter, own in settings.items():
            by_seed = found[adapter]
            for seed in arguments.seeds:
                if str(seed) not in by_seed:
                    by_seed[str(seed)] = measure(
                        problems[adapter], own, seed=seed, progress=arguments.progress
                    )
                    content = {"config": config, "found": found}
                    record.write(arguments.out, "finetune", torch.device("cpu"), content)
            print(f"{adapter}\n{table(by_seed)}", flush=True)
        draw(arguments.out.with_suffix(".png"), found)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
