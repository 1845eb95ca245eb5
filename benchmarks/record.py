"""The JSON file that a benchmark writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from recipes.common.files import write_json
from recipes.common.report import environment

RESULTS = Path(__file__).parent / "results"


def write(path: Path, benchmark: str, device: torch.device, content: dict[str, Any]) -> None:
    """Writes a benchmark's results as JSON.

    Args:
        path: The file.
        benchmark: The name of the benchmark.
        device: The device that was measured; the file names it, the machine and the versions of the libraries.
        content: The results.
    """
    record = {"benchmark": benchmark, "environment": environment(device), **content}
    write_json(path, record)
