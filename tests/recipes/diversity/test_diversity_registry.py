"""One registration adds a method or an objective from outside."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
from diversity_cases import SHORT, refusal

from recipes.common.options import positive
from recipes.common.settings import option
from recipes.diversity.command import main
from recipes.diversity.methods import METHODS, register
from recipes.diversity.methods.path import InvariantPath
from recipes.diversity.methods.weight_noise import WeightNoise
from recipes.diversity.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class DecayOptions:
    """The option of the objective below."""

    group: ClassVar[str] = "weight decay"

    decay: float = option("weight of the squared weights", default=0.5, type=positive, metavar="X")


class Decay(Objective):
    """An objective that makes weights small."""

    option_kinds = (DecayOptions,)

    def weight(self, settings):
        return settings.of(DecayOptions).decay

    def loss(self, model, others, source, generator):
        return lambda: sum(p.square().sum() for p in model.parameters())


@pytest.fixture
def added():
    register("decay", InvariantPath("path, small weights", objective=Decay()))
    register("second-noise", WeightNoise("more noise"))
    yield
    del METHODS["decay"], METHODS["second-noise"]


def test_methods_from_outside_run_like_any_other(added, tmp_path, capsys, rendered):
    arguments = ["--out", str(tmp_path), *SHORT]
    arguments += ["--objective", "decay", "--baseline", "second-noise"]
    assert main([*arguments, "--decay", "0.25"]) == 0
    printed = capsys.readouterr().out
    # Once for the run, once in the table.
    assert printed.count("path, small weights") == printed.count("more noise") == 2
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["decay"] == 0.25
    assert list(results["metrics"]["ensembles"]) == ["decay", "second-noise"]
    assert (tmp_path / "seed-0" / "decay" / "member-001.safetensors").exists()
    assert "decay 0.25 there, 0.5 asked for" in refusal(capsys, *arguments)


def test_a_name_is_registered_once(added):
    with pytest.raises(ValueError, match="'decay' is registered already"):
        register("decay", WeightNoise("noise"))
