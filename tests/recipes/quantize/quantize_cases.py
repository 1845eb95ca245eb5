"""Short settings, small networks and helpers for the tests of ``recipes.quantize``."""

import json

import pytest
import torch
from torch import nn

from recipes.quantize.command import main

SHORT = ["--no-progress", "--bits", "4", "2", "--anchors", "100", "--steps", "3"]
SHORT += ["--distillation-steps", "3"]
NAMES = ("1.weight", "3.weight", "5.weight")


def run(folder, *arguments):
    """Runs the recipe and returns its results."""
    assert main([*SHORT, *arguments, "--out", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text())


def small_cnn():
    """Two convolutions with batch norm, whose running statistics are not those of any batch, and a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )
    for layer in (model[1], model[4]):
        layer.running_mean.uniform_(-0.5, 0.5)
        layer.running_var.uniform_(0.5, 1.5)
    return model.eval()


def refusal(capsys, folder, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(folder)])
    assert stop.value.code == 2
    return capsys.readouterr().err
