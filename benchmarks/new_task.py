"""Mean time of a step over a whole run: ``python -m benchmarks.new_task --data-root DIR``.

A CNN is trained on MNIST, and copies of it are then trained on Fashion-MNIST as the ``new_task`` recipe does, one copy
for each method. The methods take turns step by step on the same batches, so that a slow phase of the machine slows all
of them and their times can be compared.
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
    """Returns a function that trains the learner for one step.

    Args:
        learner: The learner; its model is trained in place.
        steps: The number of steps of the whole run, over which the learning rate is scheduled.
        products: A counter. For each step of a ``FIPOptimizer`` the count of that step's number of products is raised.

    Returns:
        A function of inputs ``(n, ...)`` and labels ``(n,)`` that takes the step and returns its seconds.
    """
    assert isinstance(learner, InvariantPath | Plain)
    optimizer, scheduler = learner.optimizer(steps)
    loss = learner.objective() if isinstance(learner, Plain) else learner.loss

    def step(x: Tensor, y: Tensor) -> float:
        seconds = train(
            learner.model,
            iter([(x, y)]),
            optimizer,
            scheduler,
            loss=loss,
            freeze_batch_norm=learner.freeze_batch_norm,
        )
        if isinstance(optimizer, FIPOptimizer) and optimizer.last_step is not None:
            products[optimizer.last_step.iterations] += 1
        return seconds

    return step


def main() -> None:
    """Runs the benchmark, and prints and writes the mean time of a step of each method."""
    settings = DEFAULTS["mnist"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--download", action="store_true", help="download missing data")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument(
        "--epochs",
        type=positive,
        default=settings.epochs,
        help="epochs of each method; the learning rate schedule has the same length [%(default)g]",
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
    measurements = {
        "command": f"python -m benchmarks.new_task --data-root DIR --seed {seed} --epochs {epochs:g}",
        "steps": steps,
        "milliseconds_a_step": {name: 1000 * s / steps for name, s in seconds.items()},
        "ratio_to_distillation": seconds["fip"] / seconds["distillation"],
        "ratio_to_plain": seconds["fip"] / seconds["naive"],
        "steps_by_products": dict(sorted(products.items())),
    }
    print(json.dumps(measurements, indent=1))
    record.write(arguments.out, "new_task_steps", torch.device("cpu"), measurements)


if __name__ == "__main__":
    main()
