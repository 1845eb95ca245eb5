"""Properties of the command lines of all recipes."""

import sys

import pytest

from benchmarks import trade_off
from recipes.diversity import command as diversity
from recipes.finetune import command as finetune
from recipes.hotfix import command as hotfix
from recipes.new_task import command as new_task
from recipes.quantize import command as quantize
from recipes.sparsify import command as sparsify
from recipes.spectrum import command as spectrum
from recipes.split_tasks import command as split_tasks
from recipes.update import command as update


def test_a_seed_that_is_given_twice_is_refused(monkeypatch, capsys, tmp_path):
    recipes = [
        new_task,
        split_tasks,
        sparsify,
        diversity,
        hotfix,
        finetune,
        quantize,
        spectrum,
        update,
    ]
    for main in (recipe.main for recipe in recipes):
        with pytest.raises(SystemExit) as exit:
            main(["--seeds", "3", "1", "3", "--out", str(tmp_path)])
        assert exit.value.code == 2
        assert "argument --seeds: 3 is given twice" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["trade_off", "--data-root", ".", "--seeds", "3", "1", "3"])
    with pytest.raises(SystemExit) as exit:
        trade_off.main()
    assert exit.value.code == 2
    assert "argument --seeds: 3 is given twice" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
