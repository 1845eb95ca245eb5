"""How much each rank computes, and how much ranks tell each other: rows, calls and bytes."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from modes import CHECKED, EAGER, Run
from rank import Rank
from tasks import Task, normal
from torch import Tensor, nn

from benchmarks.traffic import Traffic
from fipoptim import AnchorMetric, Solver


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[Counter[str]]:
    """The number of rows that the model evaluates meanwhile, under the name "rows"."""
    found: Counter[str] = Counter()

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found["rows"] += len(args[0])

    hook = model.register_forward_pre_hook(count)
    yield found
    hook.remove()


def told(traffic: Traffic, model: nn.Module) -> dict[str, int]:
    """Calls and bytes; calls that tell a number or more for each weight apart."""
    weights = sum(p.numel() for p in model.parameters())
    vectors = [call for call in traffic.calls if call.numbers >= weights]
    others = [call for call in traffic.calls if call.numbers < weights]
    return {
        "weights": weights,
        "vectors": len(vectors),
        "vector_bytes": sum(call.bytes for call in vectors),
        "others": len(others),
        "other_bytes": sum(call.bytes for call in others),
    }


def rows(rank: Rank) -> dict[str, int]:
    """The rows that one rank evaluates of 48 anchors and 16 check inputs, two thirds of a chunk at a time."""
    run = Run(rank, Task(64), anchors={"check": 0.25, "chunk_size": 8}, solver=Solver(products=0))
    metric = AnchorMetric(run.anchors, form="double-vjp", trace=False)
    v = normal(metric.size, seed=0)
    found = {}
    whole: dict[str, Callable[[], Any]] = {
        "drift": run.anchors.drift,
        "check": run.anchors.check.drift,
        "kept": run.anchors.predictions_kept,
        "measure": run.anchors.measure,
        "matvec": functools.partial(metric.matvec, v),
        "refresh": run.anchors.refresh,
    }
    for name, evaluate in whole.items():
        with evaluated(run.model) as counted:
            evaluate()
        found[name] = counted["rows"]
    run.step(0)
    run.optimizer.zero_grad()
    run.loss(1).backward()
    with evaluated(run.model) as counted:
        run.optimizer.step()
    found["step"] = counted["rows"]
    return found


def communications(rank: Rank, **options: Any) -> dict[str, int]:
    """What ranks tell each other in the third step of a run, on top of the gradient of the batch."""
    run = Run(rank, **options).steps(2)
    run.optimizer.zero_grad()
    run.loss(2).backward()
    with Traffic() as traffic:
        run.optimizer.step()
    info = run.optimizer.last_step
    assert info is not None
    allowed = run.optimizer.solver.most_products
    return {**told(traffic, run.model), "products": info.iterations, "allowed": allowed}


def of_drift(rank: Rank) -> dict[str, int]:
    run = Run(rank)
    with Traffic() as traffic:
        run.anchors.drift()
    return told(traffic, run.model)


def of_measure(rank: Rank) -> dict[str, int]:
    run = Run(rank)
    with Traffic() as traffic:
        run.anchors.measure()
    return told(traffic, run.model)


def of_settle(rank: Rank) -> dict[str, int]:
    options = {**CHECKED, "max_drift": 0.01, "check_every": None, "form": "double-vjp"}
    run = Run(rank, **options).steps(12)
    with Traffic() as traffic:
        found = run.optimizer.settle()
    return {**told(traffic, run.model), "products": found.products, "steps": found.steps}


def step_of(**options: Any) -> Callable[[Rank], dict[str, int]]:
    return functools.partial(communications, **options)


COUNTS: dict[str, Callable[[Rank], dict[str, int]]] = {
    "rows": rows,
    "calls of products-0": step_of(solver=Solver(products=0)),
    "calls of products-1": step_of(solver=Solver(products=1), form="double-vjp"),
    "calls of products-3": step_of(**EAGER),
    "calls of products-8": step_of(solver=Solver(products=8), form="double-vjp"),
    "calls of adaptive": step_of(),
    "calls of chunks": step_of(**EAGER, anchors={"chunk_size": 4}),
    "calls of draws": step_of(**EAGER, anchors={"batch_size": 16}),
    "calls of live": step_of(**EAGER, anchors={"store": "live"}),
    "calls of a budget": step_of(**CHECKED, max_drift=0.01),
    "calls of drift": of_drift,
    "calls of measure": of_measure,
    "calls of settle": of_settle,
}
