"""Ranks are started once for each number of them, and for all workers of pytest: to import torch takes seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from filelock import FileLock
from launch import launch

Results = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """Gives what each rank of so many told of all cases; 1 is a process without a group."""
    told: dict[int, Results] = {}
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers of this run

    def of(size: int) -> Results:
        if size not in told:
            file = base / f"{size} ranks.pt"
            with FileLock(f"{file}.lock"):
                if not file.exists():
                    torch.save(launch("worker.py", base / f"{size} ranks", size), file)
            told[size] = torch.load(file, weights_only=False)
        return told[size]

    return of


@pytest.fixture(scope="session")
def values(ranks: Callable[[int], Results]) -> Callable[[int, str], list[Any]]:
    """Gives the value of one case on each rank; an error of a rank is the test's."""

    def of(size: int, case: str) -> list[Any]:
        found = [told[case] for told in ranks(size)]
        traces = "\n".join(
            f"rank {k}: {each['trace']}" for k, each in enumerate(found) if "trace" in each
        )
        assert not traces, f"{case} on {size} ranks:\n{traces}"
        return [each["value"] for each in found]

    return of
