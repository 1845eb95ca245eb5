"""How much each rank computes, and how much ranks tell each other: rows, calls and bytes."""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from modes import CHECKED, THREE, Run
from rank import Rank
from tasks import BATCH, Task, normal
from torch import Tensor, nn

from fipoptim import AnchorMetric, Solver

# The collectives of torch.distributed, with the position of what is sent.
SENT = {
    "all_reduce": 0,
    "broadcast": 0,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "reduce": 0,
    "reduce_scatter_tensor": 1,
    "all_gather_object": 1,
    "broadcast_object_list": 0,
    "barrier": None,
}


class Call:
    """One collective: its name, and the numbers and bytes that this rank sends; objects count as bytes alone."""

    def __init__(self, name: str, sent: Any) -> None:
        self.name = name
        self.numbers = sent.numel() if isinstance(sent, Tensor) else 0
        self.bytes = (
            sent.numel() * sent.element_size()
            if isinstance(sent, Tensor)
            else len(pickle.dumps(sent))
        )


@contextlib.contextmanager
def overheard() -> Iterator[list[Call]]:
    """The collectives that Python code asks for meanwhile; those of DistributedDataParallel are not among them."""
    calls: list[Call] = []

    def listening(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            position = SENT[name]
            calls.append(Call(name, None if position is None else args[position]))
            return original(*args, **kwargs)

        return collective

    with contextlib.ExitStack() as stack:
        for name in SENT:
            patched = mock.patch.object(dist, name, listening(name, getattr(dist, name)))
            stack.enter_context(patched)
        yield calls


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[Counter[str]]:
    """The number of rows that the model evaluates meanwhile, under the name "rows"."""
    found: Counter[str] = Counter()

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found["rows"] += len(args[0])

    hook = model.register_forward_pre_hook(count)
    yield found
    hook.remove()


def told(calls: list[Call], size: int) -> dict[str, int]:
    """Calls and bytes, those of vectors of ``size`` numbers apart."""
    vectors = [call for call in calls if call.numbers >= size]
    others = [call for call in calls if call.numbers < size]
    return {
        "vectors": len(vectors),
        "vector_bytes": sum(call.bytes for call in vectors),
        "others": len(others),
        "other_bytes": sum(call.bytes for call in others),
        **Counter(call.name for call in calls),
    }


def rows(rank: Rank) -> dict[str, int]:
    """The rows that one rank evaluates of 48 anchors and 16 check inputs, two thirds of a chunk at a time."""
    run = Run(rank, Task(64), anchors={"check": 0.25, "chunk_size": 8}, solver=Solver(products=0))
    metric = AnchorMetric(run.anchors, trace=False)
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
    run.loss(2, rank.part(BATCH)).backward()
    size = sum(p.numel() for p in run.model.parameters())
    with overheard() as calls:
        run.optimizer.step()
    info = run.optimizer.last_step
    assert info is not None
    return {**told(calls, size), "products": info.iterations, "weights": size}


def of_measures(rank: Rank) -> dict[str, int]:
    run = Run(rank)
    with overheard() as calls:
        run.anchors.measure()
    return told(calls, sum(p.numel() for p in run.model.parameters()))


def of_drift(rank: Rank) -> dict[str, int]:
    run = Run(rank)
    with overheard() as calls:
        run.anchors.drift()
    return told(calls, sum(p.numel() for p in run.model.parameters()))


def of_settle(rank: Rank) -> dict[str, int]:
    options = {**CHECKED, "max_drift": 0.01, "check_every": None}
    run = Run(rank, **options).steps(20)
    with overheard() as calls:
        found = run.optimizer.settle()
    size = sum(p.numel() for p in run.model.parameters())
    return {**told(calls, size), "products": found.products, "steps": found.steps}


def step_of(**options: Any) -> Callable[[Rank], dict[str, int]]:
    return functools.partial(communications, **options)


COUNTS: dict[str, Callable[[Rank], dict[str, int]]] = {
    "rows": rows,
    "calls of products-0": step_of(solver=Solver(products=0)),
    "calls of products-1": step_of(solver=Solver(products=1)),
    "calls of products-3": step_of(**THREE),
    "calls of products-8": step_of(solver=Solver(products=8)),
    "calls of adaptive": step_of(),
    "calls of chunks": step_of(**THREE, anchors={"chunk_size": 4}),
    "calls of draws": step_of(**THREE, anchors={"batch_size": 16}),
    "calls of live": step_of(**THREE, anchors={"store": "live"}),
    "calls of a budget": step_of(**CHECKED, max_drift=0.01),
    "calls of drift": of_drift,
    "calls of measure": of_measures,
    "calls of settle": of_settle,
}
