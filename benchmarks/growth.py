"""Time and memory of one step against the number of anchors, parameters, classes and products."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.memory import LiveMemory
from fipoptim import AnchorBatch, FIPOptimizer, Solver
from recipes.common.networks import lenet_300_100, paper_cnn
from recipes.common.training import synchronize

CHUNK = 500  # anchors evaluated at once if a step has more than this


def mlp(parameters: int, inputs: int = 64, classes: int = 10) -> nn.Sequential:
    """Returns a network of two hidden layers of equal width with about ``parameters`` parameters."""
    half = inputs + classes
    width = max(1, round((-half + (half**2 + 4 * parameters) ** 0.5) / 2))
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def cost(
    model: nn.Module, anchors: Tensor, new: Tensor, *, classes: int, products: int, repeats: int
) -> dict[str, float]:
    """Measures one optimizer step.

    Args:
        model: The network.
        anchors: The anchors ``(n, ...)``.
        new: The inputs of the new task ``(m, ...)``; their labels are drawn here.
        classes: The number of the network's outputs.
        products: The number of metric products in the step.
        repeats: The number of timed steps.

    Returns:
        The number of ``parameters``; ``seconds``, the time of the fastest of the timed steps without the forward and
        backward pass of the new inputs; and ``peak_bytes``, the peak memory of one step with that pass.
    """
    chunk = CHUNK if len(anchors) > CHUNK else None
    batch = AnchorBatch(model, anchors, chunk_size=chunk)
    solver = Solver(products=products, tol=0.0)
    optimizer = FIPOptimizer(model.parameters(), batch, beta=1.0, eps=1e-4, solver=solver)
    labels = torch.randint(classes, (len(new),), device=new.device)

    def step() -> float:
        optimizer.zero_grad()
        F.cross_entropy(model(new), labels).backward()
        start = time.perf_counter()
        optimizer.step()
        synchronize(new.device)
        return time.perf_counter() - start

    step()  # the first step traces the network and is not measured
    with LiveMemory() as live:
        step()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": min(step() for _ in range(repeats)),
        "peak_bytes": live.peak,
    }


def run(*, seed: int, device: torch.device) -> dict[str, Any]:
    """Returns, for each of the four quantities, the cost of a step at each of its values."""
    torch.manual_seed(seed)
    results: dict[str, Any] = {}

    def sweep(name: str, values: list[int], measure: Any) -> None:
        results[name] = {}
        for value in tqdm(values, desc=f"growth with {name}", leave=False):
            results[name][str(value)] = measure(value)

    def draw(n: int, *shape: int) -> Tensor:
        return torch.randn(n, *shape, device=device)

    sweep(
        "anchors",
        [10, 30, 100, 300, 1000, 3000, 10000],
        lambda n: cost(
            paper_cnn().to(device), draw(n, 1, 28, 28), draw(100, 1, 28, 28),
            classes=20, products=3, repeats=1 if n > 1000 else 3,
        ),
    )  # fmt: skip
    sweep(
        "parameters",
        [10**k for k in range(4, 9)],
        lambda n: cost(
            mlp(n).to(device), draw(100, 64), draw(100, 64), classes=10, products=3, repeats=2
        ),
    )
    sweep(
        "classes",
        [10, 30, 100, 300, 1000],
        lambda n: cost(
            lenet_300_100(n).to(device), draw(100, 1, 28, 28), draw(100, 1, 28, 28),
            classes=n, products=3, repeats=5,
        ),
    )  # fmt: skip
    sweep(
        "products",
        [1, 2, 4, 8, 16, 32, 64],
        lambda k: cost(
            paper_cnn().to(device), draw(100, 1, 28, 28), draw(100, 1, 28, 28),
            classes=20, products=k, repeats=2,
        ),
    )  # fmt: skip
    return results


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the time and memory of a step against each quantity, on logarithmic axes."""
    figure, axes = plt.subplots(2, 4, figsize=(12, 5), sharex="col", layout="constrained")
    for column, (name, rows) in enumerate(results.items()):
        values = [row["parameters"] if name == "parameters" else int(v) for v, row in rows.items()]
        seconds = [row["seconds"] for row in rows.values()]
        memory = [row["peak_bytes"] / 2**20 for row in rows.values()]
        for axis, ys in zip(axes[:, column], (seconds, memory), strict=True):
            axis.loglog(values, ys, marker="o", color="#1f5fa8")
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel(name)
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("peak memory (MiB)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(results: dict[str, Any]) -> str:
    """Returns a Markdown list with one line for each quantity: its values, each with seconds and peak MiB."""
    lines = []
    for name, rows in results.items():
        points = ", ".join(
            f"{int(v):,}: {row['seconds']:.3g} s, {row['peak_bytes'] / 2**20:.0f} MiB"
            for v, row in rows.items()
        )
        lines.append(f"* {name}: {points}")
    return "\n".join(lines) + "\n"
