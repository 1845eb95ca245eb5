"""Starts a program on several ranks of one machine, by gloo on CPUs, and reads what each rank has saved."""

from __future__ import annotations

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
    """How one rank ended: its exit code, what it printed, what it saved (None without a file), and after how long."""

    code: int
    errors: str
    saved: Any
    seconds: float


def launch(program: str, folder: Path, size: int, *arguments: str, limit: float = 300) -> list[Any]:
    """What each rank saved to the file that is its first argument.

    Raises:
        AssertionError: If a rank ended with an error, with what every rank printed.
    """
    ends = ended(program, folder, size, *arguments, limit=limit)
    if any(end.code for end in ends):
        told = "\n\n".join(
            f"--- rank {k} of {size}: exit code {end.code}\n{end.errors}"
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
    began, ranks = time.monotonic(), []
    for rank in range(size):
        with (folder / f"{rank}.txt").open("w") as errors:
            command = [sys.executable, str(HERE / program), str(folder / f"{rank}.pt"), *arguments]
            ranks.append(
                subprocess.Popen(
                    command, env=shared | {"RANK": str(rank)}, stdout=errors, stderr=errors
                )
            )
    seconds = [limit] * size
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() - began < limit:
            time.sleep(0.05)
            for k, rank in enumerate(ranks):
                if rank.poll() is not None:
                    seconds[k] = min(seconds[k], time.monotonic() - began)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [_end(folder, k, rank.returncode, seconds[k]) for k, rank in enumerate(ranks)]


def _end(folder: Path, rank: int, code: int, seconds: float) -> Ended:
    file = folder / f"{rank}.pt"
    saved = torch.load(file, weights_only=True) if file.exists() else None
    return Ended(code, (folder / f"{rank}.txt").read_text(), saved, seconds)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
