"""Short settings and helpers for the tests of ``recipes.hotfix``."""

import json

import pytest
from safetensors.torch import load_file

from recipes.common.data import load_task
from recipes.common.networks import digits_mlp
from recipes.hotfix.case import with_held_out
from recipes.hotfix.command import main
from recipes.hotfix.setups import SETUPS

SHORT = ["--no-progress", "--wrong", "3", "--check", "200", "--unseen", "200", "--max-steps", "60"]
SHORT += ["--plain-lr", "1e-3", "--distillation-lr", "1e-3", "--distillation-weight", "0.1"]
SHORT += ["--l2sp-lr", "1e-3", "--l2sp-weight", "0.1", "--kfac-eps", "0.1", "--kfac-damping", "0.1"]


def run(folder, *arguments):
    """Runs the recipe and returns its results."""
    assert main([*SHORT, *arguments, "--out", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text())


def network(folder, name, seed=0):
    model = digits_mlp()
    model.load_state_dict(load_file(folder / f"seed-{seed}" / f"{name}.safetensors"))
    return model.eval()


def digits():
    return with_held_out(load_task("digits"), SETUPS["digits"].held_out)


def refusal(capsys, folder, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(folder)])
    assert stop.value.code == 2
    return capsys.readouterr().err
