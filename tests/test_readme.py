"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import nn

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_examples_run_as_they_stand() -> None:
    matplotlib.use("Agg")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    names = {
        "F": F,
        "model": model,
        "old_inputs": torch.randn(20, 4),
        "new_task_loader": [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(6)],
    }
    first, recording = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(first, names)
    assert names["opt"].last_step.drift < 0.1
    assert "    ..." in recording
    exec(recording.replace("    ...", "    for _ in range(60): opt.step()"), names)
    assert len(names["path"]) == 7
    assert names["committee"](torch.randn(2, 4)).shape == (2, 3)
