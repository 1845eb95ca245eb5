"""What several ranks refuse: each case tells the error that its rank raised, and whether the weights stayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from modes import EAGER, Run, flat
from rank import Rank
from tasks import BATCH, WIDTH, Task, normal
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from fipoptim import AnchorBatch, FIPOptimizer, Solver, restore

Told = dict[str, Any]


def refused(act: Callable[[], Any], model: nn.Module | None = None) -> Told:
    """The error that an act raised; its type is empty if there was none."""
    before = None if model is None else flat(model.parameters())
    kind = message = ""
    try:
        act()
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    kept = before is None or torch.equal(before, flat(model.parameters()))
    return {"type": kind, "message": message, "kept": kept}


class Brittle(nn.Module):
    """A network whose outputs are NaN for inputs that begin with a number."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("broken_at", torch.tensor(float("inf"), dtype=torch.float64))

    def break_at(self, number: float) -> None:
        self.broken_at.fill_(number)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).masked_fill(x[:, :1] == self.broken_at, float("nan"))


class BrittleTask(Task):
    def network(self) -> nn.Module:
        return Brittle(super().network())

    @property
    def last(self) -> float:
        """The number with which the last anchor begins, which lies in the last rank's share."""
        return float(self.anchors()[-1, 0])


# --- anchors -----------------------------------------------------------------------------------------------------


def anchors(rank: Rank, inputs: Tensor | None = None, **options: Any) -> Told:
    task = Task()
    model = task.network()
    return refused(
        lambda: AnchorBatch(model, task.anchors() if inputs is None else inputs, **options)
    )


def other_anchors(rank: Rank) -> Told:
    return anchors(rank, normal(8, WIDTH, seed=rank.number))


def other_count(rank: Rank) -> Told:
    return anchors(rank, normal(8 + rank.number, WIDTH, seed=0))


def other_check_inputs(rank: Rank) -> Told:
    return anchors(rank, check=normal(8, WIDTH, seed=rank.number))


def other_dtype(rank: Rank) -> Told:
    x = torch.arange(32.0, dtype=torch.float64).reshape(8, WIDTH)
    return anchors(rank, x if rank.number == 0 else x.float())


def other_options(rank: Rank) -> Told:
    return anchors(rank, chunk_size=4 + rank.number)


def other_reference(rank: Rank) -> Told:
    return anchors(rank, reference=normal(48, 5, seed=rank.number))


def other_weights(rank: Rank) -> Told:
    model = Task().network()
    with torch.no_grad():
        next(model.parameters()).add_(0.1 * rank.number)
    return refused(lambda: AnchorBatch(model, Task().anchors()))


def few_anchors(rank: Rank) -> Told:
    return anchors(rank, normal(rank.size - 1, WIDTH, seed=0))


def few_check_inputs(rank: Rank) -> Told:
    return anchors(rank, check=normal(rank.size - 1, WIDTH, seed=0))


def few_drawn(rank: Rank) -> Told:
    return anchors(rank, batch_size=rank.size - 1)


def no_group(rank: Rank) -> Told:
    return anchors(rank, process_group="x")


def not_a_member(rank: Rank) -> Told:
    """Rank 0 is alone in the group; all others are refused."""
    return anchors(rank, process_group=dist.new_group([0]))


def no_backend(rank: Rank) -> Told:
    rank.leave()
    rank.join("cuda:gloo")
    return anchors(rank)


def built_before(rank: Rank) -> list[Told]:
    rank.leave()
    task = Task()
    model = task.network()
    early = AnchorBatch(model, task.anchors())
    rank.join()
    return [
        refused(lambda: FIPOptimizer(model.parameters(), early)),
        refused(lambda: restore(model, early, max_drift=0.1), model),
    ]


def one_fails(rank: Rank) -> Told:
    """The inputs of one rank alone are not finite."""
    x = normal(8, WIDTH, seed=0)
    if rank.number == 1:
        x[3, 2] = float("nan")
    return anchors(rank, x)


def extended_otherwise(rank: Rank) -> Told:
    run = Run(rank)
    found = refused(lambda: run.anchors.extend(normal(8, WIDTH, seed=rank.number)))
    return {**found, "kept": len(run.anchors) == 48}


def broken_at_first(rank: Rank) -> Told:
    task = BrittleTask()
    model = task.network()
    model.break_at(task.last)
    return refused(lambda: AnchorBatch(model, task.anchors()))


def broken_at_refresh(rank: Rank) -> Told:
    task = BrittleTask()
    run = Run(rank, task)
    reference = run.anchors.reference.clone()
    run.model.break_at(task.last)
    found = refused(run.anchors.refresh)
    run.model.break_at(float("inf"))
    return {**found, "kept": torch.equal(reference, run.anchors.reference)}


# --- optimizers --------------------------------------------------------------------------------------------------


def fully_sharded(rank: Rank) -> Told:
    task = Task()
    model = FullyShardedDataParallel(task.network(), device_id=torch.device("cpu"))
    return refused(lambda: AnchorBatch(model, task.anchors()))


def other_beta(rank: Rank) -> Told:
    return refused(lambda: Run(rank, beta=1.0 + rank.number))


def other_solver(rank: Rank) -> Told:
    return refused(lambda: Run(rank, solver=Solver(products=rank.number)))


def bad_option_of_one(rank: Rank) -> Told:
    return refused(lambda: Run(rank, momentum=0.5 + (rank.number == 1)))


def other_parameters(rank: Rank) -> Told:
    return refused(lambda: Run(rank, groups=lambda m: list(m.parameters())[rank.number % 2 :]))


def zero_redundancy(rank: Rank) -> Told:
    task = Task()
    model = task.network()
    net = DistributedDataParallel(model)
    held = AnchorBatch(net, task.anchors())
    return refused(
        lambda: ZeroRedundancyOptimizer(
            net.parameters(), optimizer_class=FIPOptimizer, anchors=held
        )
    )


# --- steps -------------------------------------------------------------------------------------------------------


def alone(model: nn.Module, rank: Rank) -> nn.Module:
    return model


def not_averaged(rank: Rank) -> Told:
    """The model is trained without DistributedDataParallel."""
    run = Run(rank, wrap=alone)
    run.loss(0).backward()
    return refused(run.optimizer.step, run.model)


def gradient_of_one(rank: Rank) -> Told:
    run = Run(rank, wrap=alone)
    if rank.number == 0:
        run.loss(0, slice(0, BATCH)).backward()
    return refused(run.optimizer.step, run.model)


def skipped_by_one(rank: Rank) -> Told:
    run = Run(rank)

    def closure() -> Tensor | None:
        run.optimizer.zero_grad()
        loss = run.loss(0)
        loss.backward()
        if rank.number == 1:
            run.optimizer.zero_grad()
            return None
        return loss

    return refused(lambda: run.optimizer.step(closure), run.model)


def other_lr(rank: Rank) -> Told:
    """A scheduler that follows each rank's own loss makes the steps of ranks differ."""
    run = Run(rank)
    run.optimizer.param_groups[0]["lr"] *= 1.0 + rank.number
    run.loss(0).backward()
    return refused(run.optimizer.step, run.model)


def nan_gradient(rank: Rank) -> Told:
    """A batch of one rank holds NaN, and averaging gives it to all."""
    run = Run(rank)
    if rank.number == 1:
        run.task.x = run.task.x * float("nan")
    run.loss(0).backward()
    return refused(run.optimizer.step, run.model)


def broken(rank: Rank, **options: Any) -> Told:
    """An anchor of the last rank alone has outputs that are NaN."""
    task = BrittleTask()
    run = Run(rank, task, **options)
    run.step(0)
    run.model.break_at(task.last)
    run.optimizer.zero_grad()
    run.loss(1).backward()
    return refused(run.optimizer.step, run.model)


def broken_step(rank: Rank) -> Told:
    return broken(rank, solver=Solver(products=0))


def broken_products(rank: Rank) -> Told:
    return broken(rank, **EAGER)


def broken_budget(rank: Rank) -> Told:
    return broken(rank, max_drift=0.5)


def broken_settle(rank: Rank) -> Told:
    task = BrittleTask()
    run = Run(rank, task, max_drift=0.5, check_every=None)
    run.step(0)
    run.model.break_at(task.last)
    return refused(run.optimizer.settle, run.model)


def not_measured(rank: Rank) -> list[Told]:
    """Figures that a step has not measured: to read them needs all ranks, which an attribute does not say."""
    run = Run(rank, solver=Solver(products=0))
    run.step(0)
    info = run.optimizer.last_step
    assert info is not None
    found = [
        refused(lambda: info.drift),
        refused(lambda: info.output_change),
        refused(lambda: info.multiplier),
    ]
    info.measure()
    return [*found, refused(lambda: (info.drift, info.output_change, info.multiplier))]


REFUSALS: dict[str, Callable[[Rank], Any]] = {
    case.__name__: case
    for case in (
        other_anchors,
        other_count,
        other_check_inputs,
        other_dtype,
        other_options,
        other_reference,
        other_weights,
        few_anchors,
        few_check_inputs,
        few_drawn,
        no_group,
        not_a_member,
        no_backend,
        built_before,
        one_fails,
        extended_otherwise,
        broken_at_first,
        broken_at_refresh,
        fully_sharded,
        other_beta,
        other_solver,
        bad_option_of_one,
        other_parameters,
        zero_redundancy,
        not_averaged,
        gradient_of_one,
        skipped_by_one,
        other_lr,
        nan_gradient,
        broken_step,
        broken_products,
        broken_budget,
        broken_settle,
        not_measured,
    )
}
