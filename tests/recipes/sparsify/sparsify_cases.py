"""Short settings, small networks and helpers for the tests of ``recipes.sparsify``."""

import pytest
import torch
from torch import nn

from recipes.sparsify.command import main
from recipes.sparsify.methods.baseline import BaselineOptions
from recipes.sparsify.methods.path import PathOptions
from recipes.sparsify.settings import SparsifySettings

NAMES = ("1.weight", "3.weight", "5.weight")
TOTAL = 64 * 128 + 128 * 64 + 64 * 10
SETTINGS = SparsifySettings(
    batch_size=64,
    method_options=(
        PathOptions(epochs=2, eps=1.0, probes=2, metric_decay=0.5),
        BaselineOptions(baseline_epochs=2, baseline_lr=5e-3),
    ),
)
SHORT = [
    *("--sparsity", "0.5", "0.9", "--epochs", "1", "--baseline-epochs", "1", "--no-progress"),
    *("--probes", "1"),
]


def some_masks(model, share=0.5):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(model.get_parameter(n).shape, generator=generator) > share for n in NAMES}


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, bias=False),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--resume"])
    assert stop.value.code == 2
    return capsys.readouterr().err


def killed(*args, **keywords):
    raise KeyboardInterrupt
