"""The largest case: ``python -m benchmarks.large`` takes two steps of 100 million weights on 10,000 anchors."""

from __future__ import annotations

import argparse
import json
import resource
import time
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks import record
from benchmarks.growth import mlp
from fipoptim import AnchorBatch, FIPOptimizer, Solver
from recipes.common.options import SEED, whole


def main() -> None:
    """Takes two steps with a progress bar, and prints and writes their seconds and the peak memory of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=whole(1), default=10**8)
    parser.add_argument("--anchors", type=whole(1), default=10_000)
    parser.add_argument("--chunk-size", type=whole(1), default=1000)
    parser.add_argument("--products", type=whole(0), default=3)
    parser.add_argument("--seed", type=SEED, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = mlp(arguments.parameters, inputs=784)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} weights, {arguments.anchors:,} anchors", flush=True)
    anchors = AnchorBatch(
        model,
        torch.randn(arguments.anchors, 784),
        chunk_size=arguments.chunk_size,
        progress=partial(tqdm, desc="anchors", unit="chunk"),
    )
    solver = Solver(products=arguments.products, tol=0.0)
    optimizer = FIPOptimizer(model.parameters(), anchors, beta=1.0, eps=1e-2, solver=solver)
    seconds = []
    for _ in range(2):  # only the second step has a drift to correct
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(100, 784)), torch.randint(10, (100,))).backward()
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        print(optimizer.last_step, flush=True)
    measurements = {
        "config": vars(arguments),
        "parameters": count,
        "seconds_of_two_steps": seconds,
        "peak_process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "last_step": str(optimizer.last_step),
    }
    record.write(record.RESULTS / "large.json", "large", torch.device("cpu"), measurements)
    print(json.dumps(measurements, indent=1))


if __name__ == "__main__":
    main()
