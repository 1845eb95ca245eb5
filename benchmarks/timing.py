"""Side-by-side timing. All ways take turns, round after round, so that a slow phase of the machine slows them all."""

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
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Row]:
    """Times several ways to do the same work, in turn.

    A first round warms up and is not counted.

    Args:
        ways: Functions to time, by name.
        base: The name of the way that the others are compared with.
        rounds: The number of rounds counted; each way runs once in a round.
        device: The device that computes; it is synchronized around each run.
        title: The title of the progress bar.
        clock: Gives the seconds: ``time.process_time`` does not count those in which other processes had the CPU.

    Returns:
        For each way ``seconds``, the median over the rounds, and ``ratio``, ``ratio_min`` and ``ratio_max``: the
        median, least and largest ratio of its time to that of ``base`` in the same round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in tqdm(range(rounds + 1), desc=title, unit="round", leave=False):
        for name, run in ways.items():
            synchronize(device)
            start = clock()
            run()
            synchronize(device)
            if i > 0:
                seconds[name].append(clock() - start)
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
    """Returns a Markdown table with the titles ``columns`` and the cells ``rows``."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def ratio(row: Row | None) -> str:
    """Returns the median ratio with its range over the rounds as text; a dash if ``row`` is None."""
    if row is None:
        return "–"
    return f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"
