"""Time and memory of one optimizer step, beside Adam and beside distillation with Adam.

Every step sees one batch of the new task. The steps of fipoptim and of distillation see as many anchors as this batch
has inputs. Distillation adds to the loss the mean squared distance of the anchors' outputs from the reference; a step
of ``FIPOptimizer`` without products does the same to first order.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import CASES, Case
from benchmarks.memory import LiveMemory
from benchmarks.timing import markdown, ratio, side_by_side
from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver
from fipoptim import optimizer as optimizer_module
from fipoptim.anchors.output_space import squared_distance
from fipoptim.geometry.adam import Adam

ADAM, DISTILLATION, DEFAULT = "Adam", "Adam with distillation", "fipoptim, default"
PRODUCTS = (1, 3, 8)
NAMES = (ADAM, DISTILLATION, DEFAULT, *(f"fipoptim, {k} products" for k in PRODUCTS))
# The parts of a step: the owner (a class or a module) and the name of the function that is timed.
PARTS: dict[str, tuple[Any, str]] = {
    "linearize the anchors": (AnchorMetric, "__init__"),
    "linear term": (optimizer_module, "linear_term"),
    "geometry": (Adam, "update"),
    "minimise, all": (optimizer_module, "minimise"),
    "minimise, tangents": (AnchorMetric, "jvp"),
    "minimise, products": (AnchorMetric, "matvec"),
    "move, and measure the change": (optimizer_module, "move"),
    "step, all": (FIPOptimizer, "step"),
}


class Loop:
    """One way of training, on its own copy of the network.

    Args:
        name: One of ``NAMES``.
        model: The network; it is copied.
        anchors: The anchors ``(n, ...)``.
        new: The inputs of the new task ``(n, ...)``.
        labels: The labels of ``new``, shape ``(n,)``.
        bf16: Whether the pass over ``new`` runs under bfloat16 autocast.
    """

    def __init__(
        self, name: str, model: nn.Module, anchors: Tensor, new: Tensor, labels: Tensor, bf16: bool
    ) -> None:
        self.model = copy.deepcopy(model)
        self.new, self.labels, self.bf16 = new, labels, bf16
        self.batch = AnchorBatch(self.model, anchors)
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.distils = name == DISTILLATION
        self.optimizer: torch.optim.Optimizer
        # The steps are so short that every round does the same work. At so large a beta the default takes no products.
        if name in (ADAM, DISTILLATION):
            self.optimizer = torch.optim.Adam(params, lr=1e-6)
        else:
            products = "adaptive" if name == DEFAULT else int(name.split()[1])
            self.optimizer = FIPOptimizer(
                params,
                self.batch,
                beta=500.0,
                eps=1e-4,
                precondition="adam",
                solver=Solver(products=products, tol=0.0),
            )

    def step(self) -> None:
        """Takes the forward and backward pass over the new batch, and the optimizer step."""
        self.optimizer.zero_grad()
        with torch.autocast(self.new.device.type, torch.bfloat16, enabled=self.bf16):
            loss = F.cross_entropy(self.model(self.new), self.labels)
        if self.distils:
            outputs = self.model(self.batch.inputs)
            loss = loss + squared_distance(outputs, self.batch.reference).mean()
        loss.backward()
        self.optimizer.step()


def measure(
    case: Case, *, rounds: int, seed: int, device: torch.device, bf16: bool = False
) -> dict[str, Any]:
    """Measures one case.

    Args:
        case: The network and its inputs.
        rounds: The number of timings of each way of training.
        seed: The seed of the weights and inputs.
        device: The device that computes.
        bf16: Whether the pass over the new batch runs under bfloat16 autocast.

    Returns:
        The timings of the ways in ``rows``, the peak memory of one step of each way in ``peak_bytes``, the seconds of
        each part of two kinds of step in ``parts``, and the size of the case.
    """
    made = case.make(seed, device)
    loops = {name: Loop(name, *made, bf16) for name in NAMES}
    ways: dict[str, Callable[[], object]] = {name: loop.step for name, loop in loops.items()}
    title = f"{case.name}{', bfloat16' if bf16 else ''}"
    rows = side_by_side(ways, base=ADAM, rounds=rounds, device=device, title=title)
    memory = {}
    for name, loop in loops.items():
        loop.optimizer.zero_grad()
        with LiveMemory() as live:
            loop.step()
        memory[name] = live.peak
    return {
        "inputs": case.batch,
        "parameter_vector_bytes": 4
        * sum(p.numel() for p in made[0].parameters() if p.requires_grad),
        "rows": rows,
        "peak_bytes": memory,
        "parts": {name: seconds_of_parts(loops[name], rounds) for name in (DEFAULT, NAMES[4])},
    }


def seconds_of_parts(loop: Loop, rounds: int) -> dict[str, float]:
    """Returns the mean seconds of each part of a step. Some parts contain others, so the seconds overlap."""
    seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def timed(name: str, owner: Any, method: str) -> Iterator[None]:
        original = getattr(owner, method)

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        with mock.patch.object(owner, method, run):
            yield

    def within(names: list[str]) -> None:
        if not names:
            for _ in range(rounds):
                loop.step()
            return
        with timed(names[0], *PARTS[names[0]]):
            within(names[1:])

    within(list(PARTS))
    return {name: seconds[name] / rounds for name in PARTS}


def run(*, rounds: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Measures each network once in float32, and ResNet-20 and the transformer with a bfloat16 batch as well."""
    results = {
        case.name: measure(case, rounds=rounds, seed=seed, device=device)
        for case in CASES
        if "anchors" not in case.name
    }
    for case in CASES:
        if case.name in ("ResNet-20", "transformer"):
            results[f"{case.name}, bfloat16 batch"] = measure(
                case, rounds=rounds, seed=seed, device=device, bf16=True
            )
    return results


def table(results: dict[str, Any]) -> str:
    """Returns three Markdown tables: the time, the memory and the parts of a step."""
    names = list(results)
    time_rows: list[list[Any]] = [
        ["inputs, and anchors", *(results[n]["inputs"] for n in names)],
        [ADAM, *(f"1 ({1000 * results[n]['rows'][ADAM]['seconds']:.0f} ms)" for n in names)],
    ]
    time_rows += [[way, *(ratio(results[n]["rows"][way]) for n in names)] for way in NAMES[1:]]
    memory_rows = [
        [f"{ADAM}, MiB", *(f"{results[n]['peak_bytes'][ADAM] / 2**20:.0f}" for n in names)]
    ]
    memory_rows += [
        [f"{way}, over Adam", *(f"{_vectors(results[n], way):.1f}" for n in names)]
        for way in NAMES[1:]
    ]
    parts = [
        [part, *(f"{1000 * results['CNN']['parts'][way][part]:.1f}" for way in (DEFAULT, NAMES[4]))]
        for part in PARTS
    ]
    return (
        "Time of a step, relative to Adam's:\n\n"
        + markdown(["", *names], time_rows)
        + "\nPeak memory of a step, in parameter vectors over Adam's:\n\n"
        + markdown(["", *names], memory_rows)
        + "\nParts of a step on the CNN, milliseconds:\n\n"
        + markdown(["", DEFAULT, NAMES[4]], parts)
    )


def _vectors(result: dict[str, Any], way: str) -> float:
    """Returns the peak memory of a way less that of Adam, in vectors of all optimized parameters."""
    over = result["peak_bytes"][way] - result["peak_bytes"][ADAM]
    return float(over / result["parameter_vector_bytes"])
