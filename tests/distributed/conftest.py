"""Ranks are started once for each number of them: to import torch takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from launch import launch

Results = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """Gives what each rank of so many told of all cases; 1 is a process without a group."""
    told: dict[int, Results] = {}

    def of(size: int) -> Results:
        if size not in told:
            told[size] = launch("worker.py", tmp_path_factory.mktemp("ranks") / str(size), size)
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
