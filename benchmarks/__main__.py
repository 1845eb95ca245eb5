"""Runs all benchmarks: ``make bench``, or ``python -m benchmarks --device cuda`` on a GPU."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import growth, products, record, steps
from benchmarks.cases import CASES
from recipes.common.options import SEED, whole

SUITES = ("products", "steps", "growth")
# The cases measured with torch.compile. Compiling the derivative of a larger network takes minutes on a CPU.
COMPILED = ("LeNet-300-100", "CNN", "ResNet-20")


def main() -> None:
    """Runs the chosen suites, prints their tables, and writes JSON, tables and a plot into the results folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--rounds",
        type=whole(1),
        default=7,
        help="timings of each product [%(default)s]; each step is timed half as often, at least three times",
    )
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument(
        "--compile-all", action="store_true", help="measure torch.compile on every case"
    )
    parser.add_argument("--out", type=Path, help="folder of the results [benchmarks/results]")
    arguments = parser.parse_args()
    device, seed, rounds = arguments.device, arguments.seed, arguments.rounds
    out = arguments.out or record.RESULTS
    out.mkdir(parents=True, exist_ok=True)
    suffix = "" if device.type == "cpu" else f"_{device.type}"
    for suite in dict.fromkeys(arguments.suites):
        start = time.perf_counter()
        results: dict[str, Any]
        if suite == "products":
            compiled = [case.name for case in CASES] if arguments.compile_all else COMPILED
            results = products.run(rounds=rounds, seed=seed, device=device, compiled=compiled)
            text = products.table(results)
        elif suite == "steps":
            results = steps.run(rounds=max(3, rounds // 2), seed=seed, device=device)
            text = steps.table(results)
        else:
            results = growth.run(seed=seed, device=device)
            text = growth.table(results)
            growth.plot(results, out / f"growth{suffix}.png")
        seconds = time.perf_counter() - start
        measurements = {
            "command": f"python -m benchmarks --suites {suite} --device {device} "
            f"--rounds {rounds} --seed {seed}",
            "seconds": seconds,
            "results": results,
        }
        record.write(out / f"{suite}{suffix}.json", suite, device, measurements)
        (out / f"{suite}{suffix}.md").write_text(text)
        print(f"\n{suite} ({seconds:.0f} s)\n\n{text}", flush=True)


if __name__ == "__main__":
    main()
