"""What a step costs over a whole run: ``python -m benchmarks.new_task --data-root DIR``.

Trains a CNN on MNIST and then, on copies of it, on Fashion-MNIST by several methods at once, as ``new_task`` does,
a step of each in turn on the same batch: so all meet the same machine, and their times can be compared.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import record
from fipoptim import FIPOptimizer
from recipes.common.augment import many
from recipes.common.data import DataError, load_pair
from recipes.common.networks import network_for
from recipes.common.options import SEED, positive
from recipes.common.training import minibatches, seed_everything, steps_in_epochs, train
from recipes.continual.methods import make_learner
from recipes.continual.methods.base import Learner
from recipes.continual.methods.fip import InvariantPath
from recipes.continual.methods.plain import Plain
from recipes.continual.remembered import draw_remembered
from recipes.new_task.learning import learn_first_task
from recipes.new_task.settings import DEFAULTS

COMPARED = ("fip", "distillation", "naive")


def stepper(
    learner: Learner, steps: int, products: Counter[int]
) -> Callable[[Tensor, Tensor], float]:
    """Takes a step of the learner's on a batch, says how many seconds that took, and counts its products."""
    assert isinstance(learner, InvariantPath | Plain)
    optimizer, scheduler = learner.optimizer(steps)
    loss = learner.objective() if isinstance(learner, Plain) else learner.loss

    def step(x: Tensor, y: Tensor) -> float:
        passed = train(
            learner.model,
            iter([(x, y)]),
            optimizer,
            scheduler,
            loss=loss,
            freeze_batch_norm=learner.freeze_batch_norm,
        )
        if isinstance(optimizer, FIPOptimizer) and optimizer.last_step is not None:
            products[optimizer.last_step.iterations] += 1
        return passed

    return step


def main() -> None:
    """Run, print the means, write the JSON."""
    settings = DEFAULTS["mnist"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--download", action="store_true", help="fetch what is missing")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument(
        "--epochs",
        type=positive,
        default=settings.epochs,
        help="of each method, on a cycle of that length [%(default)g]",
    )
    parser.add_argument("--out", type=Path, default=record.RESULTS / "new_task_steps.json")
    arguments = parser.parse_args()
    seed, epochs = arguments.seed, arguments.epochs
    try:
        mnist, fashion = load_pair(
            "mnist",
            "fashion-mnist",
            data_root=arguments.data_root,
            download=arguments.download,
        )
    except DataError as error:
        parser.error(str(error))
    seed_everything(seed)
    model = network_for("mnist", mnist.classes + fashion.classes)
    learn_first_task(model, mnist, settings, seed=seed, progress=True)

    steps = steps_in_epochs(fashion, settings.batch_size, epochs)
    remembered = draw_remembered(mnist, settings.anchors, seed)
    steppers: dict[str, Callable[[Tensor, Tensor], float]] = {}
    products: Counter[int] = Counter()
    for name in COMPARED:
        learner = make_learner(
            name,
            copy.deepcopy(model),
            settings,
            augment=many(mnist.name, settings.views) if settings.augment else None,
            seed=seed,
            freeze_batch_norm=True,
        )
        learner.remember(*remembered)
        steppers[name] = stepper(learner, steps, products)

    seconds = dict.fromkeys(COMPARED, 0.0)
    batches = minibatches(fashion, batch_size=settings.batch_size, epochs=epochs, seed=seed + 1)
    for x, y in tqdm(batches, total=steps, unit="step"):
        for name, step in steppers.items():
            seconds[name] += step(x, y)
    found = {
        "command": f"python -m benchmarks.new_task --data-root DIR --seed {seed} --epochs {epochs:g}",
        "steps": steps,
        "milliseconds_a_step": {name: 1000 * s / steps for name, s in seconds.items()},
        "ratio_to_distillation": seconds["fip"] / seconds["distillation"],
        "ratio_to_plain": seconds["fip"] / seconds["naive"],
        "steps_by_products": dict(sorted(products.items())),
    }
    print(json.dumps(found, indent=1))
    record.write(arguments.out, "new_task_steps", torch.device("cpu"), found)


if __name__ == "__main__":
    main()
