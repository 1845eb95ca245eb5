r"""Does a second-order correction of a step pay? ``python -m benchmarks.geodesics``.

A step ``v`` changes the outputs by :math:`J v + \frac12 z_{vv}`, and Eq. 4 sees the first term alone. The geodesic step
:math:`v + \frac12 a` with :math:`(g + \mu I) a = -\frac1N J^\top z_{vv}` takes the second one back. It costs the
products of this solution, and two forward passes and a pullback, which count as one product here. A walk with such
steps is compared with one whose steps have as many products in all, and are as long. Both are walks of
``FIPOptimizer``: without an objective (Eq. 3), and on a new task.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import record
from benchmarks.timing import markdown
from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver
from fipoptim.solver.restoring import RestoringSteps
from recipes.common.data import DATASETS, DataError, Task, load_pair
from recipes.common.networks import network_for
from recipes.common.options import SEED, Distinct, whole
from recipes.common.training import (
    accuracy,
    adam_one_cycle,
    minibatches,
    seed_everything,
    steps_in_epochs,
    train,
)
from recipes.continual.remembered import draw_remembered

HELD_OUT = 500  # test inputs of the first task on which drift is measured, too


@dataclass(frozen=True)
class Setup:
    """The walks on one pair of tasks.

    Attributes:
        tasks: The task whose outputs are held, and the new one.
        epochs: Passes in which the network is trained on the first.
        batch_size: Inputs of a step, of training and on the new task.
        anchors: Inputs whose outputs are held.
        dtype: The precision of the walks.
        length: The length of a walk, the sum of its steps.
        eps: The lengths of a step.
        budgets: Products of a step in all.
        beta: The weight of the new task.
        difference: The step of the difference that gives the second derivative, relative to ``v``.
        dampings: Dampings of the correction, relative to the curvature along its gradient.
    """

    tasks: tuple[str, str]
    epochs: float
    batch_size: int
    anchors: int
    dtype: torch.dtype
    length: float
    eps: tuple[float, ...]
    budgets: tuple[int, ...]
    beta: float
    difference: float
    dampings: tuple[float, ...] = (0.01, 0.1)


_DIGITS = Setup(
    tasks=("digits-low", "digits-high"),
    epochs=20,
    batch_size=32,
    anchors=200,
    dtype=torch.float64,
    length=4.0,
    eps=(0.2, 0.8),
    budgets=(8, 16),
    beta=10.0,
    difference=1e-2,
)
SETUPS = {
    "digits": _DIGITS,
    # So few outputs that the products of a step solve Eq. 4 exactly, and only the second order is left.
    "digits-few": replace(_DIGITS, anchors=5, budgets=(120,), dampings=(1e-6, 1e-4, 0.01)),
    "cnn": Setup(
        tasks=("mnist", "fashion-mnist"),
        epochs=1,
        batch_size=100,
        anchors=50,
        dtype=torch.float32,
        length=4.0,
        eps=(0.2, 0.8),
        budgets=(16,),
        beta=60.0,
        difference=1.0,
    ),
}


@dataclass(frozen=True)
class Walk:
    """A walk.

    Attributes:
        objective: ``"none"`` (Eq. 3) or ``"new task"``.
        geometry: The geometry of the step; None is Euclidean.
        correction: Whether the optimizer corrects the drift so far.
        eps: The length of a step.
        products: Products of the solution of Eq. 4.
        geodesic: Products of the second-order correction; None takes none.
        damping: Its damping, relative to the curvature along its gradient.
    """

    objective: str
    geometry: str | None
    correction: bool
    eps: float
    products: int
    geodesic: int | None = None
    damping: float | None = None


def acceleration(
    metric: AnchorMetric, v: Tensor, *, products: int, damping: float, difference: float
) -> Tensor:
    r"""The acceleration :math:`a = -(g + \mu I)^{-1} \frac1N J^\top z_{vv}`, flat, shape ``(n,)``.

    Args:
        metric: The metric at the start of the step.
        v: The step, shape ``(n,)``.
        products: Products of the solution.
        damping: :math:`\mu`, relative to the curvature along :math:`J^\top z_{vv}`.
        difference: The step of the central difference, relative to ``v``.
    """
    ahead, behind = (metric.outputs_after(sign * difference * v) for sign in (1, -1))
    second = (ahead - 2 * metric.outputs + behind) / difference**2
    gradient = metric.vjp(metric.mean.weighted(second))
    if not bool(gradient.any()):
        return torch.zeros_like(v)
    drift = metric.mean.squared(second)
    steps = RestoringSteps(metric.matvec, gradient, drift, max_products=products)
    unit = gradient / gradient.norm()
    return steps.step(damping * float(unit @ metric.matvec(unit.clone())))


class Problem:
    """A network that has learnt the first of two tasks, and what walks from it are measured by.

    Args:
        setup: The walks.
        tasks: The two tasks.
        seed: The seed of weights, batches and anchors.
    """

    def __init__(self, setup: Setup, tasks: tuple[Task, Task], seed: int) -> None:
        first, second = tasks
        seed_everything(seed)
        model = network_for(DATASETS[first.name].family, first.classes + second.classes)
        steps = steps_in_epochs(first, setup.batch_size, setup.epochs)
        optimizer, scheduler = adam_one_cycle(model, lr=3e-3, steps=steps)
        batches = minibatches(first, batch_size=setup.batch_size, epochs=setup.epochs, seed=seed)
        train(model, batches, optimizer, scheduler)
        self.setup, self.seed = setup, seed
        self.model = model.to(setup.dtype).eval()
        # All walks have the same anchors, so that the derivative is traced once.
        remembered = draw_remembered(first, setup.anchors, seed)[0]
        self.anchors = AnchorBatch(self.model, remembered.to(setup.dtype))
        self.held_out = AnchorBatch(self.model, first.test_inputs[:HELD_OUT].to(setup.dtype))
        self.start = copy.deepcopy(self.model.state_dict())
        self.second = second

    def losses(self, model: nn.Module) -> Iterator[Tensor]:
        """The new task's losses of minibatches, without an end."""
        size = self.setup.batch_size
        for x, y in minibatches(self.second, batch_size=size, epochs=1000, seed=self.seed):
            yield F.cross_entropy(model(x.to(self.setup.dtype)), y)

    def run(self, walk: Walk) -> dict[str, Any]:
        """Takes the steps of a walk, and measures its end.

        Returns:
            The drift of the anchors at the end and in the mean over steps, that of held-out inputs, the distance from
            the start, what has been learnt of the new task, and the CPU seconds.
        """
        model, anchors = self.model, self.anchors
        model.load_state_dict(self.start)
        params = list(model.parameters())
        optimizer = FIPOptimizer(
            params,
            anchors,
            beta=self.setup.beta,
            eps=walk.eps,
            drift_correction=walk.correction,
            precondition=walk.geometry,
            solver=Solver(products=walk.products, tol=0.0),
            generator=torch.Generator().manual_seed(self.seed),
        )
        losses, drifts, began = self.losses(model), list[float](), time.process_time()
        first = [p.detach().clone() for p in params]
        length = 0.0
        for _ in range(round(self.setup.length / walk.eps)):
            optimizer.zero_grad()
            if walk.objective != "none":
                next(losses).backward()
            length += self._step(optimizer, anchors, params, walk)
            drifts.append(float(anchors.drift()))
        seconds = time.process_time() - began
        moved = [(p.detach() - q).norm() for p, q in zip(params, first, strict=True)]
        inputs = self.second.test_inputs.to(self.setup.dtype)
        return {
            **vars(walk),
            "steps": len(drifts),
            "length": length,
            "distance": float(torch.stack(moved).norm()),
            "drift": drifts[-1],
            "mean_drift": math.fsum(drifts) / len(drifts),
            "held_out_drift": float(self.held_out.drift()),
            "new_accuracy": accuracy(model, inputs[:2000], self.second.test_labels[:2000]),
            "cpu_seconds": seconds,
        }

    def _step(
        self,
        optimizer: FIPOptimizer,
        anchors: AnchorBatch,
        params: list[nn.Parameter],
        walk: Walk,
    ) -> float:
        """Takes a step of the optimizer, corrects it if the walk is geodesic, and returns its length."""
        if walk.geodesic is None:
            optimizer.step()
            assert optimizer.last_step is not None
            return float(optimizer.last_step.step_norm)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        moved = torch._foreach_sub([p.detach() for p in params], before)
        with torch.no_grad():
            for p, kept in zip(params, before, strict=True):
                p.copy_(kept)
        metric = AnchorMetric(anchors, params, guard=False)
        v = metric.flatten(moved)
        assert walk.damping is not None
        a = acceleration(
            metric,
            v,
            products=walk.geodesic,
            damping=walk.damping,
            difference=self.setup.difference,
        )
        # A geodesic step is no longer than a plain one.
        step = v + a / 2
        step *= v.norm() / step.norm()
        with torch.no_grad():
            for p, part in zip(params, metric.unflatten(step), strict=True):
                p.add_(part)
            if (
                walk.objective == "none"
            ):  # the path goes on with the velocity at the end of the step
                for p, change in zip(params, metric.unflatten(a), strict=True):
                    optimizer.state[p]["velocity"] += change
        return float(step.norm())


def walks(setup: Setup) -> Iterator[list[Walk]]:
    """The walks that are compared, group by group.

    A group has the plain walk with all products, the walk with those products of Eq. 4 that the geodesic walks have,
    and the geodesic walks.
    """
    kinds = [("none", None), ("new task", None), ("new task", "adam")]
    for (objective, geometry), correction, eps, budget in itertools.product(
        kinds, (False, True), setup.eps, setup.budgets
    ):
        common = (objective, geometry, correction, eps)
        own = budget // 2 - 1  # one for the second derivative, the rest for the correction
        yield [
            Walk(*common, budget),
            Walk(*common, own),
            *(Walk(*common, own, budget - 1 - own, damping) for damping in setup.dampings),
        ]


def table(groups: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Returns the mean drifts over seeds as a Markdown table; a row a group.

    Args:
        groups: The results of the walks of each group, those of all seeds one after the other.
    """
    rows = []
    for group in groups:
        plain = [w for w in group if w["geodesic"] is None]
        most = max(w["products"] for w in plain)
        corrected = [w for w in group if w["geodesic"] is not None]
        means = {
            damping: _mean([w for w in corrected if w["damping"] == damping], "drift")
            for damping in dict.fromkeys(w["damping"] for w in corrected)
        }
        best = min(means, key=lambda damping: means[damping])
        same = _mean([w for w in plain if w["products"] == most], "drift")
        fewer = _mean([w for w in plain if w["products"] != most], "drift")
        first = group[0]
        rows.append(
            [
                first["objective"],
                first["geometry"] or "Euclidean",
                "yes" if first["correction"] else "no",
                f"{first['eps']:g}",
                most,
                f"{same:.3g}",
                f"{fewer:.3g}",
                f"{means[best]:.3g} ({best:g})",
                f"{same / means[best]:.2f}",
            ]
        )
    return markdown(
        [
            *("objective", "geometry", "drift corrected", "step", "products"),
            *("plain, all products", "plain, half", "geodesic (damping)", "gain"),
        ],
        rows,
    )


def _mean(walked: Sequence[dict[str, Any]], key: str) -> float:
    return math.fsum(w[key] for w in walked) / len(walked)


def main() -> None:
    """Runs all walks, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=list(SETUPS), default="digits", help="[%(default)s]")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="[%(default)s]")
    parser.add_argument("--seeds", type=SEED, nargs="+", action=Distinct, default=[0])
    parser.add_argument(
        "--groups", type=whole(1), help="only so many groups of walks, for a quick look [all]"
    )
    parser.add_argument("--out", type=Path, help="[geodesics_NETWORK.json, with the results]")
    arguments = parser.parse_args()
    setup = SETUPS[arguments.network]
    try:
        tasks = load_pair(*setup.tasks, data_root=arguments.data_root)
    except DataError as error:
        parser.error(str(error))
    chosen = list(walks(setup))[: arguments.groups]
    groups: list[list[dict[str, Any]]] = [[] for _ in chosen]
    seeds = " ".join(map(str, arguments.seeds))
    command = f"python -m benchmarks.geodesics --network {arguments.network} --seeds {seeds}"
    if arguments.groups is not None:
        command += f" --groups {arguments.groups}"
    file = arguments.out or record.RESULTS / f"geodesics_{arguments.network}.json"
    for seed in arguments.seeds:
        problem = Problem(setup, tasks, seed)
        for group, found in zip(chosen, tqdm(groups, desc=f"seed {seed}"), strict=True):
            found += [{"seed": seed, **problem.run(walk)} for walk in group]
            # Each group is kept at once, as all of them take long.
            content = {"command": command, "groups": [g for g in groups if g]}
            record.write(file, "geodesics", torch.device("cpu"), content)
    print(table(groups))


if __name__ == "__main__":
    main()
