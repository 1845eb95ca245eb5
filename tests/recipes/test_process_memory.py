"""Freed memory is returned to the system."""

from pathlib import Path

import torch

from recipes.common.process_memory import give_back


def test_freed_memory_goes_back_to_the_system():
    def resident():
        return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

    held = [torch.ones(16_000) for _ in range(4000)]  # 256 MB in blocks that the heap would keep
    before = resident()
    held = held[::100]
    assert not give_back(1)
    assert give_back()
    assert resident() < before - 2e8
    assert len(held) == 40
