"""One registration adds a method from outside to the command line, runs, tables and files."""

import json
from dataclasses import dataclass

import pytest
from recipe_helpers import SHORT

from recipes.common.settings import option
from recipes.continual import methods
from recipes.continual.methods.base import Method
from recipes.continual.methods.plain import AdamOptions, Plain
from recipes.new_task import command as new_task
from recipes.split_tasks import command as split_tasks


@dataclass(frozen=True, kw_only=True)
class DecayOptions(AdamOptions):
    strength: float = option("weight of the squared weights", default=0.01, type=float)


class Decay(Plain):
    options: DecayOptions

    def holding(self):
        return lambda: (
            self.options.strength * sum(p.square().sum() for p in self.model.parameters())
        )


DECAY = Method("decay", "weight decay", Decay, DecayOptions)


@pytest.fixture(autouse=True)
def registered():
    methods.register(DECAY)
    yield
    del methods.METHODS["decay"]


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'decay' is registered already"):
        methods.register(DECAY)


def test_the_help_lists_the_options_of_a_registered_method(capsys):
    for main in (new_task.main, split_tasks.main):
        with pytest.raises(SystemExit):
            main(["--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert (
            "--decay-strength DECAY_STRENGTH weight decay: weight of the squared weights" in shown
        )
        assert "--decay-lr X weight decay: Adam's highest learning rate [0.003 / 0.003" in shown


def test_a_registered_method_runs_beside_the_others(tmp_path, capsys, rendered):
    chosen = ["--method", "naive", "decay", "--decay-strength", "0.5"]
    assert new_task.main(["--out", str(tmp_path), *SHORT, *chosen]) == 0
    assert "weight decay" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["metrics"]["baselines"]) == ["naive", "decay"]
    assert results["config"]["tuning"]["decay"] == {"lr": 3e-3, "momentum": None, "strength": 0.5}
    assert (tmp_path / "decay.pt").exists()
    decayed, naive = (results["metrics"]["baselines"][m] for m in ("decay", "naive"))
    # The registered method took its own steps.
    assert decayed["drift_held_out"] != naive["drift_held_out"]
