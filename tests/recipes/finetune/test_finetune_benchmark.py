"""``benchmarks.finetune`` on the tiny encoder: all runs of a seed take turns, and the front is the front."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import finetune
from recipes.finetune.methods import METHODS
from recipes.finetune.text_problem import EncoderProblem


def test_the_front_has_the_points_that_no_other_one_beats():
    points = [{"drift": d, "nll": n} for d, n in ((1, 5), (2, 4), (3, 4), (4, 2), (4, 3), (5, 2))]
    assert finetune.front(points) == [points[0], points[1], points[3]]
    assert finetune.front(points[:1] * 2) == points[:1] * 2


def test_a_seed_is_measured_and_shown(tiny, tmp_path):
    sizes = {"batch_size": 8, "anchors": 12, "anchor_batch": 6, "check": 8, "train": 6, "head": 5}
    sizes |= {"test": 10, "queries": 15, "index": 20, "max_tokens": 12, "rank": 2, "steps": 3}
    settings = replace(finetune.settings_of("lora", 1.0), **sizes)
    folders = str(tiny / "model"), "lora", tiny / "texts", ["birds", "boats"]
    problem = EncoderProblem(*folders, settings, development=False, device=torch.device("cpu"))
    found = {"0": finetune.measure(problem, settings, seed=0, progress=False)}
    assert set(found["0"]) == {"start", *METHODS}
    assert len(found["0"]["distillation"]) == 8
    points = [p for name in METHODS for p in found["0"][name]]
    assert all(p["steps"] == 3 for p in points)
    best = finetune.best_of_sweep(found["0"])
    assert best["nll"] == min(p["nll"] for p in found["0"]["distillation"])
    text = finetune.table(found)
    assert text.count("\n") == 2 + 1 + len(points) + 1
    assert f"best NLL of the sweep (lr {best['choice']['lr']:g}" in text
    finetune.draw(tmp_path / "f.png", {"lora": found})
    assert (tmp_path / "f.png").stat().st_size > 0


def test_a_seed_that_is_given_twice_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune", "--seeds", "1", "1"])
    with pytest.raises(SystemExit):
        finetune.main()
    assert "argument --seeds: 1 is given twice" in capsys.readouterr().err
