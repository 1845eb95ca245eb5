"""The JSON that a benchmark leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from recipes.common.files import write_json
from recipes.common.report import environment

RESULTS = Path(__file__).parent / "results"


def write(path: Path, benchmark: str, device: torch.device, found: dict[str, Any]) -> None:
    """Writes what was found, with the environment it was found in."""
    record = {"benchmark": benchmark, "environment": environment(device), **found}
    write_json(path, record)
