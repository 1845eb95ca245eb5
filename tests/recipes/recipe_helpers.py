"""Helpers that several tests of the recipes share."""

import json

import torch

from recipes.common.data import Task

SHORT = ["--epochs", "2", "--task1-epochs", "2", "--anchors", "20", "--no-progress"]
SHORT += ["--baseline-epochs", "2"]


def blobs(n=200):
    """Returns a task of two classes that differ in the sign of their mean."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    inputs = torch.randn(n, 1, 8, 8, generator=generator) + (2.0 * labels - 1).reshape(-1, 1, 1, 1)
    return Task("blobs", 2, 0, inputs, labels, inputs, labels)


def without_cost(folder):
    """Returns the results without seconds and peak memory, which depend on the machine."""
    results = json.loads((folder / "results.json").read_text())
    for metrics in (results["metrics"], *results["metrics"]["baselines"].values()):
        metrics.pop("seconds")
        metrics.pop("peak_megabytes", None)
    return results


def killed(*args, **keywords):
    raise KeyboardInterrupt
