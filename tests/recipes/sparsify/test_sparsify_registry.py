"""One registration adds a pruning method from outside; the recipe reads all else from its class."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
from sparsify_cases import SHORT, TOTAL, refusal

from recipes.common.options import positive
from recipes.common.settings import option
from recipes.sparsify.command import main
from recipes.sparsify.methods import METHODS, register
from recipes.sparsify.methods.baseline import BaselineOptions
from recipes.sparsify.methods.gradual import Gradual


@dataclass(frozen=True, kw_only=True)
class PowerOptions:
    """The option of the method below."""

    group: ClassVar[str] = "power of the magnitude"

    power: float = option("exponent of the magnitude", default=3.0, type=positive, metavar="X")


class PowerOfMagnitude(Gradual):
    """Gradual pruning by a power of the magnitude, the same in all layers."""

    title = "power, labels"
    option_kinds = (*Gradual.option_kinds, PowerOptions)
    used: ClassVar[list[float]] = []

    def score(self, weight):
        """Returns a power of the magnitude, in the shape of ``weight``."""
        power = self.settings.of(PowerOptions).power
        self.used.append(power)
        return weight.abs() ** power


@pytest.fixture
def power():
    register("power", PowerOfMagnitude)
    yield PowerOfMagnitude
    del METHODS["power"]


def test_a_method_from_outside_runs_like_any_other(power, tmp_path, capsys, short_dense):
    arguments = ["--out", str(tmp_path), *SHORT, "--method", "fip", "power"]
    assert main([*arguments, "--power", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("power, labels") == 3  # the plan, the run, the table
    assert set(power.used) == {2.0}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["power"] == 2.0
    assert results["metrics"]["baselines"]["power"]["title"] == "power, labels"
    assert results["metrics"]["baselines"]["power"]["nonzero"] == TOTAL - round(0.9 * TOTAL)
    assert (tmp_path / "seed-0" / "power-0.9.safetensors").exists()
    assert "power 2.0 there, 3.0 asked for" in refusal(capsys, *arguments)


def test_the_help_lists_the_options_of_a_registered_method_with_their_defaults(power, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "power of the magnitude:" in printed
    assert "--power X exponent of the magnitude [3 / 3 / 3]" in printed


def test_a_name_is_registered_once(power):
    with pytest.raises(ValueError, match="'power' is registered already"):
        register("power", Gradual)


def test_methods_with_the_same_options_share_one_options_class(power):
    kinds = [kind for method in METHODS.values() for kind in method.option_kinds]
    assert kinds.count(BaselineOptions) == len(METHODS) - 1
