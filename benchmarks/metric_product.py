"""What a repeated metric product costs: ``python -m benchmarks.metric_product``.

On the paper's CNN (1,476,548 parameters) and 500 anchors, every way to a product is timed in turn, round after
round in one process, so that all see the same machine, and given as the ratio to one forward and backward pass
over the same anchors. Writes ``benchmarks/results/metric_product.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

with warnings.catch_warnings():
    # Dependencies of curvlinops use deprecated parts of torch.
    warnings.simplefilter("ignore")
    from curvlinops import GGNLinearOperator

from fipoptim import AnchorBatch, AnchorMetric
from fipoptim.metric import TRACE_AFTER
from recipes.networks import paper_cnn
from recipes.report import environment

FORWARD_BACKWARD = "forward + backward"


def ways(anchors: int, seed: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; all on the same network, anchors and vector."""
    torch.manual_seed(seed)
    model = paper_cnn().eval()
    inputs = torch.randn(anchors, 1, 28, 28)
    params = list(model.parameters())
    v = torch.randn(sum(p.numel() for p in params))
    batch = AnchorBatch(model, inputs)
    traced, fresh, double = (
        AnchorMetric(batch, form=form) for form in ("forward", "forward", "double-vjp")
    )
    for _ in range(TRACE_AFTER + 1):
        traced.matvec(v)
    target = torch.zeros_like(batch.reference)
    ggn = GGNLinearOperator(
        model, nn.MSELoss(reduction="sum"), params, [(inputs, target)], check_deterministic=False
    )

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(inputs).square().sum(), params)

    def in_blocks() -> list[tuple[Tensor, ...]]:
        return [
            torch.autograd.grad(model(block).square().sum(), params) for block in traced._blocks()
        ]

    def untraced() -> Tensor:
        for chunk in fresh._linearizations():
            chunk._products = 0  # stay in the state of the first products
        return fresh.matvec(v)

    # All must compute the same before their times are worth comparing.
    expected = traced.matvec(v)
    for product in (untraced(), double.matvec(v), (ggn @ v) / (2 * anchors)):
        torch.testing.assert_close(
            product, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )
    return {
        FORWARD_BACKWARD: forward_backward,
        "forward + backward, in the metric's blocks": in_blocks,
        "fipoptim, repeated product": lambda: traced.matvec(v),
        "fipoptim, first products (not traced)": untraced,
        "fipoptim, double-VJP form": lambda: double.matvec(v),
        "curvlinops GGN product": lambda: ggn @ v,
    }


def measure(anchors: int, rounds: int, seed: int) -> dict[str, dict[str, float]]:
    """Seconds of each way (median over rounds) and its ratio to the forward+backward of the same round."""
    timed = ways(anchors, seed)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for i in tqdm(range(rounds + 1), desc=f"{anchors} anchors", unit="round"):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    base = seconds[FORWARD_BACKWARD]
    ratios = {name: [t / b for t, b in zip(ts, base, strict=True)] for name, ts in seconds.items()}
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(ratios[name]),
            "ratio_min": min(ratios[name]),
            "ratio_max": max(ratios[name]),
        }
        for name in timed
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--anchors", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "metric_product.json"
    )
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for anchors in arguments.anchors:
        results[str(anchors)] = measure(anchors, arguments.rounds, arguments.seed)
        print(
            f"\n{anchors} anchors, ratio to one forward + backward (median, min, max over rounds)"
        )
        for name, row in results[str(anchors)].items():
            print(
                f"  {name:44s} {row['ratio']:5.2f}  ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
                f"  {1000 * row['seconds']:8.1f} ms"
            )
    record = {
        "benchmark": "metric_product",
        "config": {"rounds": arguments.rounds, "seed": arguments.seed, "network": "paper_cnn"},
        "environment": environment(torch.device("cpu")),
        "anchors": results,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
