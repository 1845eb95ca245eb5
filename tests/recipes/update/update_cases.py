"""Short settings and helpers for the tests of ``recipes.update``."""

import json

from safetensors.torch import load_file

from recipes.common.data import load_task
from recipes.common.networks import digits_mlp
from recipes.update.case import divide, make_case
from recipes.update.command import main

SHORT = ["--no-progress", "--old-epochs", "5", "--epochs", "1", "--baseline-epochs", "1"]
SHORT += ["--anchors", "100", "--anchor-batch", "20", "--max-flips", "0.01", "0.05"]
HELD_OUT = 0.3  # the default for digits


def run(folder, *arguments):
    """Runs the recipe and returns its results."""
    assert main([*SHORT, *arguments, "--out", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text())


def network(folder, name, classes=10, seed=0):
    model = digits_mlp(classes)
    model.load_state_dict(load_file(folder / f"seed-{seed}" / f"{name}.safetensors"))
    return model.eval()


def case_of(folder, seed=0):
    """The case that the recipe made of its old network."""
    parts = divide(load_task("digits"), HELD_OUT, seed=seed)
    return make_case(network(folder, "old", classes=5, seed=seed), parts, None)
