"""The memory of the process (not what methods remember): its peak, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

GIVE_BACK_EVERY = 100  # steps
# On Linux: writing "5" to the first resets the peak, VmHWM, that the second shows.
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """The peak inside the ``with`` block: of the device's allocator, or of the whole process on a CPU.

    Attributes:
        peak: Bytes; None if the system does not tell, as on a CPU under any system but Linux.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak: int | None = None

    def __enter__(self) -> PeakMemory:
        """Starts a new peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                _RESET.write_text("5")
            except OSError:
                self.device = torch.device("meta")  # so that __exit__ reads nothing
        return self

    def __exit__(self, *error: object) -> None:
        """Reads the peak."""
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "cpu":
            lines = _STATUS.read_text().splitlines()
            found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
            self.peak = 1024 * int(found[0]) if found else None


def give_back(step: int = 0) -> bool:
    """Returns freed memory of the process to the system, at every hundredth step of a long loop.

    glibc keeps freed memory. After many steps with tensors of many sizes it keeps ten times what is in use. Other C
    libraries do not need this.

    Args:
        step: The number of the step; 0 always gives memory back.

    Returns:
        Whether memory went back.
    """
    if step % GIVE_BACK_EVERY:
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0))
    except (OSError, AttributeError):
        return False
