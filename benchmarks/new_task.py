"""What a step costs over a whole run: ``python -m benchmarks.new_task --data-root DIR``.

Trains the paper's CNN on MNIST and then, on copies of it, on Fashion-MNIST in three ways at once, a step of each in
turn on the same batch: with ``FIPOptimizer`` as ``recipes.new_task`` sets it, with distillation from the same anchors
by Adam, and by Adam alone. Only time is compared, so distillation is not tuned here.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import record
from fipoptim import AnchorBatch, FIPOptimizer
from fipoptim.anchors import squared_distance
from recipes.data import DataError, load_pair
from recipes.learners import InvariantPath
from recipes.networks import paper_cnn
from recipes.new_task import DEFAULTS
from recipes.training import (
    adam_one_cycle,
    minibatches,
    seed_everything,
    steps_an_epoch,
    steps_of,
    train,
    training_mode,
)


def main() -> None:
    """Run, print the means, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--download", action="store_true", help="fetch what is missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "new_task_steps.json")
    arguments = parser.parse_args()
    seed, settings = arguments.seed, DEFAULTS["mnist"]
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
    model = paper_cnn()
    steps = settings.task1_epochs * steps_an_epoch(mnist, settings.batch_size)
    batches = minibatches(
        mnist, batch_size=settings.batch_size, epochs=settings.task1_epochs, seed=seed
    )
    train(model, batches, *adam_one_cycle(model, lr=settings.task1_lr, steps=steps))

    inputs = mnist.train_inputs[: settings.anchors]
    steps = steps_of(fashion, settings.batch_size, settings.epochs)
    models = {name: copy.deepcopy(model) for name in ("fipoptim", "distillation", "adam")}
    anchors = AnchorBatch(models["distillation"], inputs, batch_size=settings.anchor_batch)
    path = InvariantPath(
        models["fipoptim"], settings, None, augment=None, seed=seed, freeze_batch_norm=True
    )
    path.remember(inputs, mnist.train_labels[: settings.anchors])
    lr = settings.tuning["naive"].lr
    optimizers = {
        name: path.optimizer(steps)
        if name == "fipoptim"
        else adam_one_cycle(models[name], lr=lr, steps=steps)
        for name in models
    }

    def step(name: str, x: Tensor, y: Tensor, number: int) -> float:
        net, (optimizer, scheduler) = models[name], optimizers[name]
        training_mode(net, freeze_batch_norm=True)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        if name == "distillation":
            loss = loss + _distance(net, anchors, number) / settings.beta
        loss.backward()
        optimizer.step()
        scheduler.step()
        return time.perf_counter() - start

    seconds = dict.fromkeys(models, 0.0)
    products: Counter[int] = Counter()
    batches = minibatches(
        fashion, batch_size=settings.batch_size, epochs=settings.epochs, seed=seed + 1
    )
    for number, (x, y) in enumerate(tqdm(batches, total=steps, unit="step")):
        for name in models:
            seconds[name] += step(name, x, y, number)
        ours = optimizers["fipoptim"][0]
        assert isinstance(ours, FIPOptimizer)
        assert ours.last_step is not None
        products[ours.last_step.iterations] += 1
    found = {
        "command": f"python -m benchmarks.new_task --data-root DIR --seed {seed}",
        "steps": steps,
        "milliseconds_a_step": {name: 1000 * s / steps for name, s in seconds.items()},
        "ratio_to_distillation": seconds["fipoptim"] / seconds["distillation"],
        "ratio_to_adam": seconds["fipoptim"] / seconds["adam"],
        "steps_by_products": dict(sorted(products.items())),
    }
    print(json.dumps(found, indent=1))
    record.write(arguments.out, "new_task_steps", torch.device("cpu"), found)


def _distance(model: nn.Module, anchors: AnchorBatch, number: int) -> Tensor:
    sample = anchors.sample(number)
    return squared_distance(model(sample.inputs), sample.reference).mean()


if __name__ == "__main__":
    main()
