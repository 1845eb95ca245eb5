"""``recipes.finetune`` in two processes comes to the table of one, and only one of them speaks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from two_processes import REFUSED, RUNS, given

from recipes.finetune.command import main

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def launched(tiny, tmp_path_factory):
    """The folder that two processes have left, and what they said."""
    out = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("two_processes.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", script, tiny, out],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_come_to_the_figures_of_one(name, launched, tiny, tmp_path):
    assert main([*given(tiny, tmp_path, name), *RUNS[name]]) == 0
    one, two = (
        json.loads((folder / name / "results.json").read_text())
        for folder in (tmp_path, launched[0])
    )
    assert one["config"] == two["config"]
    assert [r["environment"]["processes"] for r in (one, two)] == [1, 2]
    assert list(two["metrics"]) == list(one["metrics"])
    for method, found in one["metrics"].items():
        for alone, shared in zip(found["points"], two["metrics"][method]["points"], strict=True):
            assert alone["drift"] > 0
            for key in ("accuracy", "nll", "drift", "kept", "steps"):
                assert shared[key] == pytest.approx(alone[key], rel=1e-4), (method, key)
            told, account = (p["runs"][0]["account"] for p in (shared, alone))
            assert told == pytest.approx(account, rel=1e-4)


def test_the_budget_was_settled_together(launched):
    results = json.loads((launched[0] / "texts" / "results.json").read_text())
    (point,) = results["metrics"]["fip"]["points"]
    account = point["runs"][0]["account"]
    assert account["drift_before"] > 0.002 >= account["drift_after"]


def test_both_end_alike_and_one_says_why(launched):
    out, said, errors = launched
    statuses = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert statuses[0] == statuses[1]
    for name, status in statuses[0].items():
        assert status == (2 if name in REFUSED else 0)
    assert errors.count("argument --batch-size: 1 cannot be shared by 2 processes") == 1
    assert errors.count("argument --device: with several processes give cuda, not cuda:0") == 1
    assert errors.count("argument --anchors: 5000 is more than the") == 1
    assert errors.count("rank 2 there, 3 asked for") == 1
    assert said.count("results.json and trade_off.png are in") == 4


def test_a_resumed_run_repeats_what_is_missing(launched):
    out, said, _ = launched
    assert said.count("plain fine-tuning lr 0.0001:") == 3  # texts, language, and texts resumed
    assert said.count("interpolation lr 0.0001 share 0.2:") == 1
    assert (out / "texts" / "seed-0" / "plain.json").exists()


def test_processes_stop_at_the_same_step_when_the_time_is_used_up(launched):
    results = json.loads((launched[0] / "time" / "results.json").read_text())
    for method in ("fip", "plain"):
        (point,) = results["metrics"][method]["points"]
        assert point["steps"] >= 1
        assert point["seconds"] >= 0.9 * 0.3
