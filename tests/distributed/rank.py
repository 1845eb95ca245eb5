"""One process among others: it joins a process group and leaves it, as often as it likes."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

# How long a collective waits for the other ranks, and how long a rank waits for them between two groups.
TIMEOUT, PATIENCE = timedelta(seconds=60), timedelta(seconds=300)


class Rank:
    """This process, as the environment describes it.

    Attributes:
        number: Its number, from 0.
        size: The number of processes. One alone has no process group.
    """

    def __init__(self) -> None:
        self.number, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._met = 0
        if self.size > 1:
            self._store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                self.size,
                is_master=self.number == 0,
                timeout=PATIENCE,
            )

    def meet(self) -> None:
        """Wait for the other ranks; this needs no process group."""
        if self.size == 1:
            return
        self._met += 1
        self._store.set(f"met/{self._met}/{self.number}", "here")
        self._store.wait([f"met/{self._met}/{k}" for k in range(self.size)], PATIENCE)

    def join(self, backend: str = "gloo") -> None:
        """Make a new default group of all ranks."""
        self.meet()
        if self.size > 1:
            store = dist.PrefixStore(f"group/{self._met}", self._store)
            dist.init_process_group(
                backend, store=store, rank=self.number, world_size=self.size, timeout=TIMEOUT
            )
            self.meet()  # who leaves sooner closes connections that others are still opening

    def end(self) -> None:
        """Say that this rank asks nothing more of the others; rank 0, by which they meet, waits for that."""
        if self.size > 1:
            self._store.set(f"end/{self.number}", "here")
            if self.number == 0:
                self._store.wait([f"end/{k}" for k in range(self.size)], PATIENCE)

    def leave(self) -> None:
        """Destroy the default group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def part(self, count: int) -> slice:
        """The rows of this rank, out of as many as all ranks have together; they divide evenly."""
        each, left = divmod(count, self.size)
        assert left == 0
        return slice(self.number * each, (self.number + 1) * each)
