"""What a step costs on several ranks: anchors evaluated, calls, bytes, memory: ``python -m benchmarks.ranks``.

Everything is counted and nothing timed, so that figures are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from benchmarks import record
from benchmarks.memory import LiveMemory
from benchmarks.traffic import Traffic
from fipoptim import AnchorBatch, FIPOptimizer, Solver, restore
from fipoptim.shards import local
from recipes.common.options import whole

WIDTH, OUTPUTS, BATCH = 128, 10, 32
# Options of the optimizer, by the name of the case.
STEPS: dict[str, dict[str, Any]] = {
    "no products": {"solver": Solver(products=0)},
    "adaptive": {},
    "3 products": {"solver": Solver(products=3)},
    "budget at every step": {"max_drift": 1e-3, "beta": 100.0},
}


def network() -> nn.Module:
    """A multilayer perceptron."""
    torch.manual_seed(0)
    hidden = [part for _ in range(4) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, OUTPUTS))


class Evaluated:
    """Counts the rows that a network is evaluated on.

    Attributes:
        rows: The number so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rows = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, model: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.rows += len(args[0])


class Counted:
    """One network on this rank, and what is counted of it.

    Args:
        wrap: Makes the network that is called for the loss.
        anchors: The number of anchors.
        options: Options of the optimizer.
    """

    def __init__(
        self, wrap: Callable[[nn.Module], nn.Module], anchors: int, options: dict[str, Any]
    ) -> None:
        self.model = network()
        self.evaluated = Evaluated(self.model)
        self.called = wrap(self.model)
        self.size = sum(p.numel() for p in self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(anchors, WIDTH, generator=generator)
        self.batch = torch.randn(BATCH, WIDTH, generator=generator)
        self.anchors = AnchorBatch(self.model, inputs)
        chosen: dict[str, Any] = {"precondition": "adam", "eps": 0.1, "beta": 1.0} | options
        self.optimizer = FIPOptimizer(self.model.parameters(), self.anchors, **chosen)

    def backward(self) -> None:
        """A backward pass of the loss on the batch."""
        self.optimizer.zero_grad()
        labels = torch.arange(BATCH) % OUTPUTS
        F.cross_entropy(self.called(self.batch), labels).backward()

    def step(self) -> None:
        """A step of training."""
        self.backward()
        self.optimizer.step()

    def count(self, case: str, work: Callable[[], Any]) -> dict[str, Any]:
        """What ``work`` takes on this rank.

        Returns:
            ``rows``: the inputs on which this rank evaluates the network. ``vector_sums``: all-reduces of a number for
            each weight that the rank holds. ``number_sums``: other all-reduces, of ``number_bytes`` in all.
            ``gathers``, ``scatters``: how often all weights are gathered, and all gradients scattered.
            ``peak_numbers_per_weight``: numbers made on the way and alive together, for each weight of the network.
        """
        rows = self.evaluated.rows
        held = sum(local(p).numel() for p in self.model.parameters())
        with Traffic() as traffic, LiveMemory() as memory:
            work()
        vectors, numbers = traffic.sums(held // 2), traffic.sums(0, held // 2)
        return {
            "case": case,
            "rows": self.evaluated.rows - rows,
            "vector_sums": len(vectors),
            "number_sums": len(numbers),
            "number_bytes": sum(call.bytes for call in numbers),
            "gathers": traffic.numbers("allgather_base") * dist.get_world_size() / self.size,
            "scatters": traffic.numbers("reduce_scatter_base") / self.size,
            "peak_numbers_per_weight": memory.peak / 4 / self.size,
        }


def on_rank(rank: int, ranks: int, wrapper: str, anchors: int, folder: str) -> None:
    """Counts all cases on one rank, and writes what rank 0 has counted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    wrap = WRAPPERS[wrapper]
    rows = []
    for name, options in STEPS.items():
        counted = Counted(wrap, anchors, options)
        counted.step()  # the first step makes state and traces
        counted.step()
        counted.backward()
        rows.append(counted.count(name, counted.optimizer.step))
        info = counted.optimizer.last_step
        assert info is not None
        rows[-1] |= {"products": info.iterations, "backtracks": info.backtracks}
    counted = Counted(wrap, anchors, {"solver": Solver(products=0), "beta": 1e6})
    for _ in range(3):
        counted.step()
    rows.append(counted.count("drift()", counted.anchors.drift))
    found: list[Any] = []
    limit = 0.5 * counted.anchors.drift()
    restored = counted.count(
        "restore()",
        lambda: found.append(
            restore(counted.model, counted.anchors, max_drift=limit, max_products=8)
        ),
    )
    rows.append(restored | {"products": found[0].products, "steps": found[0].steps})
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def replicated(model: nn.Module) -> nn.Module:
    """The network in DistributedDataParallel."""
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    """The network sharded by FSDP2."""
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"DDP": replicated, "FSDP2": sharded}


def measure(ranks: int, wrapper: str, anchors: int) -> list[dict[str, Any]]:
    """What rank 0 of so many counts."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(on_rank, (ranks, wrapper, anchors, folder), nprocs=ranks)
        rows = json.loads(Path(folder, "rows.json").read_text())
    return [{"wrapper": wrapper, "ranks": ranks, **row} for row in rows]


def main() -> None:
    """Counts on each number of ranks, prints the figures and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=whole(1), nargs="+", default=[1, 2, 4])
    parser.add_argument("--wrappers", nargs="+", choices=list(WRAPPERS), default=list(WRAPPERS))
    parser.add_argument("--anchors", type=whole(4), default=64)
    arguments = parser.parse_args()
    rows = []
    for wrapper in arguments.wrappers:
        for ranks in arguments.ranks:
            found = measure(ranks, wrapper, arguments.anchors)
            rows += found
            for row in found:
                print(json.dumps(row), flush=True)
    size = sum(p.numel() for p in network().parameters())
    measurements = {"config": vars(arguments) | {"weights": size}, "rows": rows}
    record.write(record.RESULTS / "ranks.json", "ranks", torch.device("cpu"), measurements)


if __name__ == "__main__":
    main()
