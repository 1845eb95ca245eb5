"""A network that has forgotten, brought back: ``python -m benchmarks.restore --data-root DIR``.

A CNN learns MNIST, and then Fashion-MNIST by plain training, which forgets MNIST. ``restore`` brings it back from 500
images without labels, to several budgets. Beside it stand the networks on the straight line between the two (WiSE-FT;
Wortsman et al., 2022), which cost nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from fipoptim import AnchorBatch, restore
from recipes.common.data import DataError, Task, load_pair
from recipes.common.networks import network_for
from recipes.common.options import SEED, Distinct
from recipes.common.training import (
    accuracy,
    adam_one_cycle,
    minibatches,
    seed_everything,
    steps_in_epochs,
    train,
)
from recipes.continual.remembered import draw_remembered
from recipes.new_task.learning import learn_first_task
from recipes.new_task.settings import DEFAULTS

BUDGETS = (0.1, 0.05, 0.02, 0.01)  # largest shares of flips among the anchors
SHARES = tuple(k / 20 for k in range(21))  # of the way from the first network to the second
EPOCHS, RATE = 0.5, 3e-3  # of plain training on Fashion-MNIST
ANCHORS = 500


def interpolated(old: nn.Module, new: nn.Module, share: float) -> nn.Module:
    """The network that is this share of the way from ``old`` to ``new``."""
    model = copy.deepcopy(old)
    with torch.no_grad():
        for p, q in zip(model.parameters(), new.parameters(), strict=True):
            p.lerp_(q, share)
    return model


def measure(tasks: tuple[Task, Task], *, seed: int, anchors: int, epochs: float) -> dict[str, Any]:
    """Measures one seed.

    Args:
        tasks: The task that is forgotten, and the one that is learnt.
        seed: The seed of weights, batches and anchors.
        anchors: The number of images to restore from.
        epochs: Passes of plain training over the second task.

    Returns:
        Accuracies in percent on the test images of both tasks: ``before`` and ``after`` plain training, on the
        ``line`` between them, and ``restored`` to each budget, with what that took.
    """
    first, second = tasks
    settings = DEFAULTS["mnist"]
    seed_everything(seed)
    model = network_for("mnist", first.classes + second.classes)
    learn_first_task(model, first, settings, seed=seed, progress=False)
    old = copy.deepcopy(model)
    steps = steps_in_epochs(second, settings.batch_size, epochs)
    optimizer, scheduler = adam_one_cycle(model, lr=RATE, steps=steps)
    batches = minibatches(second, batch_size=settings.batch_size, epochs=epochs, seed=seed + 1)
    train(model, batches, optimizer, scheduler, freeze_batch_norm=True)

    def both(network: nn.Module) -> dict[str, float]:
        found = [accuracy(network, t.test_inputs, t.test_labels) for t in tasks]
        return {"old": found[0], "new": found[1], "mean": sum(found) / 2}

    known = first.classes

    def old_outputs(z: Tensor) -> Tensor:
        return z[:, :known]

    inputs, _ = draw_remembered(first, anchors, seed)
    restored = []
    for budget in BUDGETS:
        network = copy.deepcopy(model)
        batch = AnchorBatch(network, inputs, output=old_outputs, reference=old)
        found = restore(network, batch, max_flips=budget)
        restored.append(
            {
                "max_flips": budget,
                **both(network),
                "within": found.within,
                "flips": found.after.flips,
                "drift": found.after.drift,
                "drift_before": found.before.drift,
                "products": found.products,
                "seconds": found.seconds,
            }
        )
    line = [{"share": share, **both(interpolated(old, model, share))} for share in SHARES]
    return {
        "steps": steps,
        "before": both(old),
        "after": both(model),
        "line": line,
        "restored": restored,
    }


def on_line(line: list[dict[str, float]], old: float) -> float:
    """The accuracy on the new task of the line's networks at the accuracy ``old`` on the old one, interpolated."""
    best = -1.0
    for a, b in itertools.pairwise(line):
        if min(a["old"], b["old"]) <= old <= max(a["old"], b["old"]) and a["old"] != b["old"]:
            part = (old - a["old"]) / (b["old"] - a["old"])
            best = max(best, a["new"] + part * (b["new"] - a["new"]))
    return best


def shown(seed: int, found: dict[str, Any]) -> str:
    """The figures of a seed as text."""
    lines = [
        f"seed {seed}: after plain training {found['after']['old']:.2f} / {found['after']['new']:.2f}"
    ]
    best = max(found["line"], key=lambda point: point["mean"])
    lines.append(
        f"  best of the line ({best['share']:.2f}): {best['old']:.2f} / {best['new']:.2f}, mean {best['mean']:.2f}"
    )
    for point in found["restored"]:
        beside = on_line(found["line"], point["old"])
        lines.append(
            f"  max_flips={point['max_flips']:g}: {point['old']:.2f} / {point['new']:.2f}, mean {point['mean']:.2f}; "
            f"the line has {beside:.2f} there; {point['products']} products, {point['seconds']:.0f} s"
            f"{'' if point['within'] else '; the budget was not reached'}"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark for each seed, prints the figures, and writes the JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.restore",
        description="Bring a network back that has forgotten, beside interpolation.",
    )
    parser.add_argument("--data-root", type=Path, required=True, metavar="DIR")
    parser.add_argument("--download", action="store_true", help="fetch data that is not there")
    parser.add_argument("--seeds", type=SEED, nargs="+", action=Distinct, default=[0])
    parser.add_argument(
        "--validation",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="test on this share of the training images, held out: for choosing settings",
    )
    parser.add_argument("--anchors", type=int, default=ANCHORS, metavar="N")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "restore.json", metavar="FILE")
    arguments = parser.parse_args()
    try:
        tasks = load_pair(
            "mnist", "fashion-mnist", data_root=arguments.data_root, download=arguments.download
        )
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if arguments.validation > 0:
        tasks = tasks[0].held_out(arguments.validation), tasks[1].held_out(arguments.validation)
    by_seed = {}
    for seed in arguments.seeds:
        by_seed[str(seed)] = measure(tasks, seed=seed, anchors=arguments.anchors, epochs=EPOCHS)
        print(shown(seed, by_seed[str(seed)]), flush=True)
        config = {
            "anchors": arguments.anchors,
            "epochs": EPOCHS,
            "lr": RATE,
            "validation": arguments.validation,
        }
        found = {"config": config, "by_seed": by_seed}
        record.write(arguments.out, "restore", torch.device("cpu"), found)


if __name__ == "__main__":
    main()
