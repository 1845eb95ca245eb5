"""What several ranks must do as one process does: training in every mode, and what else is asked of anchors.

Each mode is a function of the rank. It gives the networks that were visited, flat, and figures. Each rank is given all
anchors, and an equal part of each batch. Once the network is there the ranks' own random states differ.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from rank import Rank
from tasks import BATCH, CLASSES, WIDTH, Task, Texts, normal
from torch import Tensor, nn
from torch.distributed._composable import replicate
from torch.nn.parallel import DistributedDataParallel

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver, restore

# The steps of a run: many where the kind of step is tried, fewer where something else is.
STEPS, FEW = 50, 12
# Some steps of a run with these options take products and others none, or most take a few. To take them without a trace
# saves the seconds that a trace takes.
SOMETIMES = {"beta": 1.0, "eps": 0.2}
MOSTLY = {"beta": 0.1, "eps": 0.05, "form": "double-vjp"}
THREE: dict[str, Any] = {"solver": Solver(products=3)}
EAGER = {**THREE, "form": "double-vjp"}
# Figures that each rank knows alone are told in a list of this name, which no other run is compared with.
OWN = "own"


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def wrapped(model: nn.Module, rank: Rank) -> nn.Module:
    return DistributedDataParallel(model) if rank.size > 1 else model


def replicated(model: nn.Module, rank: Rank) -> nn.Module:
    return replicate(model) if rank.size > 1 else model


class Run:
    """One training.

    Args:
        rank: The rank.
        task: What is learnt.
        anchors: Options of AnchorBatch.
        wrap: Makes the network one whose gradients are averaged.
        options: Options of FIPOptimizer.
    """

    def __init__(
        self,
        rank: Rank,
        task: Task | None = None,
        *,
        anchors: dict[str, Any] | None = None,
        wrap: Callable[[nn.Module, Rank], nn.Module] = wrapped,
        groups: Callable[[nn.Module], Any] = nn.Module.parameters,
        **options: Any,
    ) -> None:
        self.rank, self.task = rank, task or Task()
        self.model = self.task.network()
        torch.manual_seed(rank.number)
        self.net = wrap(self.model, rank)
        self.anchors = AnchorBatch(self.net, self.task.anchors(), **anchors or {})
        self.optimizer = FIPOptimizer(groups(self.model), self.anchors, **options)
        self.path = [flat(self.model.parameters())]
        self.products: list[int] = []
        self.figures: list[float] = []

    def loss(self, step: int, part: slice | None = None, net: nn.Module | None = None) -> Tensor:
        """The loss of this rank's part of the batch of a step, or of the given part."""
        part = self.rank.part(BATCH) if part is None else part
        return self.task.loss(net or self.net, self.task.batch(step), part)

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.loss(step).backward()
        self.optimizer.step()

    def steps(self, count: int = STEPS, take: Callable[[int], None] | None = None) -> Run:
        """Take steps, and measure each tenth."""
        for k in range(len(self.path) - 1, len(self.path) - 1 + count):
            (take or self.step)(k)
            self.path.append(flat(self.model.parameters()))
            info = self.optimizer.last_step
            self.products.append(0 if info is None else info.iterations)
            if k % 10 == 9:
                self.measure()
        return self

    def measure(self) -> None:
        info = self.optimizer.last_step
        assert info is not None
        if self.rank.size > 1:
            info.measure()
        self.figures += [info.drift, info.output_change, info.multiplier, info.step_norm]
        self.figures += [info.backtracks, self.anchors.drift(), self.anchors.predictions_kept()]

    def end(self, *figures: float, **own: Any) -> dict[str, Any]:
        """What is told of the run."""
        counted = self.anchors.counted
        now = counted.measure()
        found = [now.drift, now.flips, counted.drift("sum"), *figures]
        state = [t for s in self.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        return {
            "path": torch.stack(self.path),
            "figures": torch.tensor([*self.figures, *found], dtype=torch.float64),
            "anchors": len(self.anchors),
            "products": self.products,
            "reference": self.anchors.reference.double(),
            "state": flat(state) if state else torch.zeros(0),
            OWN: own,
        }


def train(rank: Rank, *, steps: int = STEPS, **options: Any) -> dict[str, Any]:
    return Run(rank, **options).steps(steps).end()


# --- how a step gets its gradient ----------------------------------------------------------------------------


def without_objective(rank: Rank) -> dict[str, Any]:
    """L = 0."""
    run = Run(rank, eps=0.05, solver=Solver(max_products=4), form="double-vjp")
    return run.steps(take=lambda k: run.optimizer.step()).end()


def accumulation(rank: Rank) -> dict[str, Any]:
    """Two halves of a rank's part, of which the first is not averaged by itself."""
    run = Run(rank)
    whole = rank.part(BATCH)
    middle = (whole.start + whole.stop) // 2

    def take(k: int) -> None:
        run.optimizer.zero_grad()
        with run.net.no_sync() if rank.size > 1 else torch.enable_grad():
            (run.loss(k, slice(whole.start, middle)) / 2).backward()
        (run.loss(k, slice(middle, whole.stop)) / 2).backward()
        run.optimizer.step()

    return run.steps(take=take).end()


def closure(rank: Rank) -> dict[str, Any]:
    """A closure that skips each fifth batch on all ranks."""
    run = Run(rank, momentum=0.5)

    def take(k: int) -> None:
        def evaluate() -> Tensor | None:
            run.optimizer.zero_grad()
            if k % 5 == 0:
                return None
            loss = run.loss(k)
            loss.backward()
            return loss

        run.optimizer.step(evaluate)

    return run.steps(FEW, take=take).end()


def secondary(rank: Rank) -> dict[str, Any]:
    """Each rank's loss is of its part; nobody but the optimizer averages."""
    batches: Iterator[int] = iter(range(FEW))
    run = Run(rank, secondary=lambda: run.loss(next(batches), net=run.model))
    return run.steps(FEW, take=lambda k: run.optimizer.step()).end()


# --- budgets ---------------------------------------------------------------------------------------------------


def settled(rank: Rank, **options: Any) -> dict[str, Any]:
    """A budget that holds at checks, or once the network is settled."""
    run = Run(rank, Task(64), anchors={"check": 0.25}, **options).steps(FEW)
    found = run.optimizer.settle()
    run.path.append(flat(run.model.parameters()))
    beta = run.optimizer.param_groups[0]["beta"]
    return run.end(beta, found.before.drift, found.products, found.went_back, found.length)


def restored(rank: Rank, **budget: float) -> dict[str, Any]:
    run = Run(rank, anchors={"chunk_size": 7})
    with torch.no_grad():
        for k, p in enumerate(run.model.parameters()):
            p.add_(0.3 * normal(*p.shape, seed=k))
    run.path.append(flat(run.model.parameters()))
    found = restore(run.net, run.anchors, form="double-vjp", **budget)
    run.path.append(flat(run.model.parameters()))
    return run.end(found.before.drift, found.after.drift, found.products, found.length)


# --- anchors ---------------------------------------------------------------------------------------------------


def batch_norm(rank: Rank) -> dict[str, Any]:
    """Batch norm in training mode: each rank has statistics of its own, and the anchors see those of rank 0."""
    run = Run(rank, Task(normed=True)).steps()
    before = [b.clone() for b in run.model.buffers()]
    drift = run.anchors.drift()
    kept = all(torch.equal(b, c) for b, c in zip(before, run.model.buffers(), strict=True))
    alone = AnchorBatch(
        run.model, run.anchors.inputs, reference=run.anchors.reference, process_group=False
    )
    return run.end(drift, buffers_kept=kept, drift=drift, drift_alone=alone.drift())


def in_pairs(rank: Rank) -> dict[str, Any]:
    """Each pair of ranks shares all anchors; the gradients are averaged over all ranks."""
    group = None if rank.size == 1 else dist.new_subgroups(2)[0]
    return train(rank, steps=FEW, **EAGER, anchors={"process_group": group})


def grown(rank: Rank) -> dict[str, Any]:
    """Another reference on the way, and then further anchors."""
    run = Run(rank, anchors={"check": normal(16, WIDTH, seed=7)}).steps(4)
    run.anchors.refresh()
    run.steps(4)
    run.anchors.extend(normal(7, WIDTH, seed=8), check=normal(3, WIDTH, seed=9))
    return run.steps(4).end(*run.anchors.fingerprint())


def copied(rank: Rank) -> dict[str, Any]:
    """A copy of model, anchors and optimizer, and a state that is saved and loaded, go on along the same path."""
    run = Run(rank, anchors={"batch_size": 16}, precondition="adam").steps(5)
    model, anchors, optimizer = copy.deepcopy((run.model, run.anchors, run.optimizer))
    weights = copy.deepcopy(run.model.state_dict())
    states = copy.deepcopy((run.anchors.state_dict(), run.optimizer.state_dict()))
    run.steps(5)
    again = Run(rank, anchors={"batch_size": 16}, precondition="adam")
    again.model.load_state_dict(weights)
    again.anchors.load_state_dict(states[0])
    again.optimizer.load_state_dict(states[1])
    again.path = run.path[:6]
    again.steps(5)
    run.model, run.anchors, run.optimizer = model, anchors, optimizer
    run.net, run.path = wrapped(model, rank), run.path[:6]
    run.steps(5)
    return run.end(float(torch.equal(run.path[-1], again.path[-1])))


def measures(rank: Rank) -> dict[str, Any]:
    """What the metric and the anchors say at one network, with another reference than the network of now."""
    task = Task(50)
    model = task.network()
    torch.manual_seed(rank.number)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for k, p in enumerate(other.parameters()):
            p.add_(0.3 * normal(*p.shape, seed=k))
    anchors = AnchorBatch(model, task.anchors(), reference=other)
    metric = AnchorMetric(anchors, form="double-vjp", trace=False)
    signs = torch.Generator().manual_seed(0)
    figures = [
        *metric.dense().flatten(),
        *metric.diagonal(),
        *metric.spectrum(3),
        *metric.matvec(normal(metric.size, seed=1)),
        *anchors.drift("none"),
        anchors.measure().drift,
        anchors.measure().flips,
        anchors.predictions_kept(),
        *anchors.fingerprint(),
    ]
    return {
        "path": flat(model.parameters()).unsqueeze(0),
        "figures": torch.tensor([float(x) for x in figures], dtype=torch.float64),
        "anchors": len(anchors),
        "products": [],
        "reference": anchors.reference,
        "state": metric.diagonal(4, generator=signs),
        OWN: {"rows": len(metric.outputs), "jvp": len(metric.jvp(normal(metric.size, seed=1)))},
    }


def jitter(inputs: Tensor) -> Tensor:
    return inputs + 0.1 * torch.randn_like(inputs)


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    first, last = model[0], model[-1]
    return [
        {"params": first.parameters(), "lr": 0.02, "beta": 2.0},
        {"params": last.parameters(), "momentum": 0.5},
    ]


def pruned(model: nn.Module) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p[p.abs() < p.abs().median()] = 0.0
    return model.parameters()


def mode(**options: Any) -> Callable[[Rank], dict[str, Any]]:
    return functools.partial(train, **options)


def few(**options: Any) -> Callable[[Rank], dict[str, Any]]:
    return functools.partial(train, steps=FEW, **options)


CHECKED = {"task": Task(64), "anchors": {"check": 0.25}, "eps": 0.1}
LIKELY = {"store": 2, "output": "probabilities"}
assert LIKELY["store"] < CLASSES

MODES: dict[str, Callable[[Rank], dict[str, Any]]] = {
    "adaptive": mode(**SOMETIMES),
    "adam": mode(**MOSTLY, precondition="adam"),
    "muon": mode(**EAGER, precondition="muon", momentum=0.9),
    "products-0": mode(solver=Solver(products=0), beta=0.1),
    "products-3": mode(**THREE),
    "no-correction": few(**EAGER, drift_correction=False),
    "momentum": mode(**MOSTLY, momentum=0.9),
    "groups": few(**EAGER, groups=two_groups),
    "keep-zeros": few(**EAGER, groups=pruned, keep_zeros=True),
    "replicate": few(**EAGER, wrap=replicated),
    "L=0": without_objective,
    "accumulation": accumulation,
    "closure": closure,
    "secondary": secondary,
    "draws": mode(**MOSTLY, anchors={"batch_size": 18}),
    "augmentation": mode(**MOSTLY, anchors={"augment": jitter, "batch_size": 18}),
    "in-pairs": in_pairs,
    "each-by-itself": few(**EAGER, anchors={"process_group": False}),
    "uneven": few(**EAGER, task=Task(50)),
    "chunks": few(**EAGER, anchors={"chunk_size": 5}),
    "half": few(**EAGER, anchors={"store": "half"}),
    "live": few(**EAGER, anchors={"store": "live"}),
    "likely-classes": few(**EAGER, anchors=LIKELY),
    "texts": few(**EAGER, task=Texts(), anchors={"output": "nats_per_token"}),
    "double-vjp": few(**EAGER),
    "finite-difference": few(**THREE, form="finite-difference"),
    "max-drift": mode(**CHECKED, max_drift=0.01),
    "max-flips": mode(steps=20, **CHECKED, max_flips=0.1),
    "both-bounds": few(**CHECKED, **EAGER, max_drift=0.05, max_flips=0.15),
    "checks": functools.partial(settled, max_drift=0.01, check_every=5, eps=0.1, form="double-vjp"),
    "settled": functools.partial(
        settled, max_flips=0.1, check_every=None, eps=0.1, form="double-vjp"
    ),
    "beta-auto": functools.partial(
        settled, beta="auto", max_drift=0.02, check_every=None, form="double-vjp"
    ),
    "restore": restored,
    "restore-drift": functools.partial(restored, max_drift=0.02),
    "restore-flips": functools.partial(restored, max_flips=0.1),
    "batch-norm": batch_norm,
    "refresh-extend": grown,
    "copy-resume": copied,
    "measures": measures,
}

# The modes that four ranks run as well.
ON_FOUR = {
    *("adaptive", "muon", "momentum", "L=0", "draws", "max-drift", "batch-norm", "uneven"),
}
