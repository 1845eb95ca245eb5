"""The most memory that was taken at once, and memory that is kept for nothing."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

GIVE_BACK_EVERY = 100  # steps
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """The peak inside the ``with`` block: of the device's allocator, or of the whole process on a CPU.

    Attributes:
        peak: Bytes; None where the system does not tell (a CPU elsewhere than on Linux).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak: int | None = None

    def __enter__(self) -> PeakMemory:
        """Forgets the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                _RESET.write_text("5")  # resets VmHWM, the peak of the resident set
            except OSError:
                self.device = torch.device("meta")  # nobody can tell
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
    """Returns freed memory of the process to the system, in every hundredth step of a long loop.

    Over many steps with tensors of many sizes the hoard of glibc grows to ten times of what is in use; other C
    libraries hoard none.

    Returns:
        Whether memory went back.
    """
    if step % GIVE_BACK_EVERY:
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0))
    except (OSError, AttributeError):
        return False
