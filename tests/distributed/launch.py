"""Starts a program on several ranks of one machine, by gloo on CPUs, and reads what each rank has saved."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
TESTS = HERE.parent


class Ended(NamedTuple):
    """How one rank ended: its exit code, what it printed, and what it saved (None without a file)."""

    code: int
    printed: str
    saved: Any


def launch(
    program: str, folder: Path, size: int, *arguments: str, limit: float = 1200
) -> list[Any]:
    """What each rank saved to the file that is its first argument.

    Raises:
        AssertionError: If a rank ended with an error, with what every rank printed.
    """
    ends = ended(program, folder, size, *arguments, limit=limit)
    if any(end.code for end in ends):
        told = "\n\n".join(
            f"--- rank {k} of {size}: exit code {end.code}\n{end.printed}"
            for k, end in enumerate(ends)
        )
        raise AssertionError(f"{program}:\n{told}")
    return [end.saved for end in ends]


def ended(program: str, folder: Path, size: int, *arguments: str, limit: float) -> list[Ended]:
    """How each rank of a program of this folder ended; those that still run after ``limit`` seconds are killed."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    end, ranks = time.monotonic() + limit, []
    try:
        for rank in range(size):
            command = [sys.executable, str(HERE / program), str(folder / f"{rank}.pt"), *arguments]
            own = shared | {"RANK": str(rank)}
            with (folder / f"{rank}.txt").open("w") as told:
                ranks.append(subprocess.Popen(command, env=own, stdout=told, stderr=told))
        for process in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, end - time.monotonic()))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [_end(folder, rank, process.returncode) for rank, process in enumerate(ranks)]


def _end(folder: Path, rank: int, code: int) -> Ended:
    file = folder / f"{rank}.pt"
    saved = torch.load(file, weights_only=True) if file.exists() else None
    return Ended(code, (folder / f"{rank}.txt").read_text(), saved)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
