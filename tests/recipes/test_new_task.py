"""recipes.new_task from its command line to its files."""

import csv
import json
import math
import sys

import pytest
import torch
from recipe_helpers import SHORT, without_cost

from recipes.common.data import load_pair, load_task
from recipes.common.networks import digits_mlp
from recipes.common.training import (
    accuracy,
)
from recipes.new_task import command as new_task
from recipes.new_task import learning

METRICS = {
    "task1_before",
    "task1_after",
    "task1_worst_on_path",
    "task2_after",
    "mean_after",
    "drift",
    "seconds",
}


def test_the_tested_steps_are_dense_at_the_start_of_the_new_task():
    assert learning.tested_steps(5) == [0, 1, 2, 3, 4, 5]
    steps = learning.tested_steps(1200)
    assert steps[:10] == [0, 1, 2, 3, 5, 10, 20, 50, 60, 100]
    assert steps[-1] == 1200
    assert 25 <= len(steps) <= 30


def test_results_hold_the_documented_entries(digits_run):
    results = json.loads((digits_run / "results.json").read_text())
    assert set(results) == {"recipe", "config", "environment", "metrics"}
    assert results["recipe"] == "new_task"
    assert results["config"]["anchors"] == 20
    assert results["config"]["seed"] == 0
    assert {"python", "torch", "torchvision", "cpu", "threads", "device"} <= set(
        results["environment"]
    )
    fip = results["metrics"]
    naive = fip["baselines"]["naive"]
    assert set(fip) >= METRICS
    assert set(naive) >= METRICS
    for metrics in (fip, naive):
        assert all(math.isfinite(metrics[name]) for name in METRICS)
        assert metrics["task1_worst_on_path"] <= min(
            metrics["task1_before"], metrics["task1_after"]
        )
        assert metrics["mean_after"] == pytest.approx(
            (metrics["task1_after"] + metrics["task2_after"]) / 2
        )
    assert naive["task1_before"] == fip["task1_before"]
    assert fip["task1_before"] > 50  # percent, not fractions


def test_the_path_is_kept_as_numbers_and_as_a_picture(digits_run):
    for name in ("path", "bars", "scores", "weights"):
        assert (digits_run / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((digits_run / "results.json").read_text())
    with (digits_run / "path.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "fip"]
    assert [int(row["step"]) for row in rows[:7]] == [0, 1, 2, 3, 4, 5, 6]
    worst = min(float(row["task1"]) for row in rows)
    assert worst == results["metrics"]["task1_worst_on_path"]
    assert float(rows[-1]["drift"]) == results["metrics"]["drift"]
    assert not list(digits_run.glob(".*"))  # no half-written file is left


def test_networks_on_the_path_can_be_opened(digits_run):
    from fipoptim import FIPPath

    path = FIPPath.open(digits_run / "networks")
    with (digits_run / "path.csv").open() as file:
        tested = {int(r["step"]): r for r in csv.DictReader(file) if r["method"] == "fip"}
    assert set(path.steps) <= set(tested)
    model, (low, _) = digits_mlp(), load_pair("digits-low", "digits-high")
    path.load_into(model, -1)
    task1 = accuracy(model, low.test_inputs, low.test_labels)
    assert task1 == float(tested[path.steps[-1]]["task1"])


def test_the_same_seed_gives_the_same_results(digits_run, tmp_path):
    assert new_task.main(["--out", str(tmp_path), *SHORT]) == 0
    assert without_cost(tmp_path) == without_cost(digits_run)


def test_several_seeds_are_averaged_and_compared_pair_by_pair(tmp_path, capsys, rendered):
    arguments = ["--out", str(tmp_path), *SHORT, "--method", "fip", "naive", "--seeds", "1", "2"]
    assert new_task.main(arguments) == 0
    runs = [json.loads((tmp_path / f"seed-{s}/results.json").read_text()) for s in (1, 2)]
    both = json.loads((tmp_path / "results.json").read_text())
    path, plain = both["metrics"], both["metrics"]["baselines"]["naive"]
    own = [run["metrics"]["task2_after"] for run in runs]
    theirs = [run["metrics"]["baselines"]["naive"]["task2_after"] for run in runs]
    assert path["task2_after"] == pytest.approx(sum(own) / 2)
    assert [run["task2_after"] for run in plain["by_seed"]] == theirs
    found = plain["path_less_this"]["task2_after"]
    first, second = own[0] - theirs[0], own[1] - theirs[1]
    assert found["mean"] == pytest.approx((first + second) / 2)
    assert found["standard_error"] == pytest.approx(abs(first - second) / 2)
    assert both["config"]["seeds"] == [1, 2]
    assert "path_less_this" not in path
    printed = capsys.readouterr().out
    assert "paired differences on these 2 seeds" in printed.split("mean ± standard deviation")[1]
    assert f"{found['mean']:+.2f} ± {found['standard_error']:.2f}" in printed


@pytest.mark.parametrize(
    "options",
    [
        "--precondition none --schedule constant --products 2 --momentum 0.5",
        "--output-space probabilities --schedule cosine --radius 0.5 --anchor-batch none",
        "--max-drift 0.01 --check 0 --anchor-batch 10",
    ],
)
def test_options_reach_the_optimizer(options, tmp_path):
    arguments = ["--out", str(tmp_path), *SHORT, "--method", "fip"]
    assert new_task.main([*arguments, *options.split()]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    if "--max-drift" in options:
        with (tmp_path / "path.csv").open() as file:
            drifts = [float(row["drift"]) for row in csv.DictReader(file) if row["method"] == "fip"]
        assert drifts[-1] <= results["config"]["max_drift"] == 0.01


def test_validation_never_sees_the_test_part(tmp_path, rendered):
    task = load_task("digits-low")
    held = task.held_out(0.25)
    assert len(held.test_inputs) == round(0.25 * len(task.train_inputs))
    both = torch.cat([held.train_inputs, held.test_inputs]).flatten(1)
    assert torch.equal(both.unique(dim=0), task.train_inputs.flatten(1).unique(dim=0))
    assert torch.equal(held.test_inputs, task.held_out(0.25).test_inputs)
    arguments = ["--out", str(tmp_path), *SHORT, "--method", "fip", "--validation", "0.25"]
    assert new_task.main(arguments) == 0
    assert json.loads((tmp_path / "results.json").read_text())["config"]["validation"] == 0.25


def test_the_paper_network_runs_on_torchvision_data(image_root, capsys):
    out = image_root / "out"
    arguments = ["--task1", "mnist", "--task2", "fashion-mnist", "--data-root", str(image_root)]
    small = ["--batch-size", "20", "--anchors", "10", "--epochs", "1", "--task1-epochs", "1"]
    assert new_task.main([*arguments, *small, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    for word in ("mnist before", "worst on path", "fashion-mnist after", "drift", "seconds"):
        assert word in printed.out
    assert "drift" in printed.err  # the progress bar


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task1", "emnist"], "digits-low"),
        (["--task2", "mnist"], "choose digits-high"),
        (["--task2", "digits-low"], "choose two different"),
        (["--anchors", "100000"], "argument --anchors: 100000 is more than"),
        (["--anchors", "5", "--anchor-batch", "6"], "argument --anchor-batch"),
        (["--epochs", "-1"], "argument --epochs"),
        (["--task1-epochs", "1.5"], "not a whole number"),
        (["--beta", "nan"], "argument --beta"),
        (["--method", "dropout"], "choose from"),
        (["--ewc-strength", "much"], "argument --ewc-strength"),
        (["--gem-lr", "0"], "argument --gem-lr"),
        (["--eps", "0"], "argument --eps"),
        (["--max-drift", "-1"], "argument --max-drift"),
        (["--products", "some"], "argument --products"),
        (["--radius", "0"], "argument --radius"),
        (["--device", "abacus"], "argument --device"),
        (["--seed", "-3"], "argument --seed"),
        (["--seed", "1", "--seeds", "1"], "not allowed with"),
        (["--seeds", "0", "0"], "argument --seeds: 0 is given twice"),
        (["--seeds", "2", "1", "02"], "argument --seeds: 2 is given twice"),
        (["--task1", "mnist", "--task2", "fashion-mnist", "--data-root", "none"], "--download"),
    ],
)
def test_bad_input_is_told_before_anything_runs(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        new_task.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file_is_an_error(tmp_path, capsys):
    (tmp_path / "out").write_text("taken")
    with pytest.raises(SystemExit):
        new_task.main(["--out", str(tmp_path / "out")])
    assert "argument --out" in capsys.readouterr().err


def test_all_methods_run_side_by_side(tmp_path, rendered):
    arguments = ["--out", str(tmp_path), *SHORT, "--method", "all", "--augment"]
    assert new_task.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    baselines = results["metrics"]["baselines"]
    others = ["dark-experience", "replay", "ewc", "gem", "lwf"]
    assert list(baselines) == ["naive", "distillation", "distillation-muon", *others]
    for metrics in baselines.values():
        assert metrics["task1_before"] == results["metrics"]["task1_before"]
        assert metrics["steps"] == 42
        gained = metrics["task1_after"] - metrics["task1_before"]
        assert metrics["backward_transfer"] == pytest.approx(gained)
        assert metrics["task1_within_task"] >= metrics["task1_after"]
    assert baselines["naive"]["remembered_megabytes"] == 0
    assert results["config"]["tuning"]["ewc"]["strength"] == 100.0
    assert (tmp_path / "bars.png").exists()


def test_a_tuning_option_reaches_only_its_method(tmp_path):
    arguments = ["--method", "distillation", "--distillation-strength", "0", "--replay-lr", "1"]
    arguments += ["--distillation-muon-lr", "0.5", "--distillation-momentum", "0.5"]
    assert new_task.main(["--out", str(tmp_path), *SHORT, *arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    tuned = {"lr": 1e-2, "strength": 0.0, "momentum": 0.5}
    assert results["config"]["tuning"]["distillation"] == tuned
    assert results["config"]["tuning"]["naive"]["momentum"] is None
    assert results["config"]["tuning"]["replay"]["lr"] == 1.0
    assert results["config"]["tuning"]["distillation-muon"]["lr"] == 0.5
    # Nothing holds the first task.
    assert results["metrics"]["baselines"]["distillation"]["task1_after"] < 20


def test_a_method_that_is_not_installed_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "avalanche.training.templates", None)
    with pytest.raises(SystemExit):
        new_task.main(["--out", str(tmp_path / "out"), "--method", "fip", "gem"])
    assert "gem needs avalanche-lib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
