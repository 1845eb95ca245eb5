"""Side-by-side timing: every way in turn, round after round, so that all see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm import tqdm

from recipes.common.training import synchronize

Row = dict[str, float]


def side_by_side(
    ways: Mapping[str, Callable[[], object]],
    *,
    base: str,
    rounds: int,
    device: torch.device,
    title: str,
) -> dict[str, Row]:
    """Seconds of each way (median over rounds), and its ratio to ``base`` in the same round.

    The first round warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in tqdm(range(rounds + 1), desc=title, unit="round", leave=False):
        for name, run in ways.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    rows = {}
    for name, times in seconds.items():
        ratios = [t / b for t, b in zip(times, seconds[base], strict=True)]
        rows[name] = {
            "seconds": statistics.median(times),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return rows


def markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def ratio(row: Row | None) -> str:
    """A ratio with its range over rounds, or a dash where there is none."""
    if row is None:
        return "–"
    return f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"
