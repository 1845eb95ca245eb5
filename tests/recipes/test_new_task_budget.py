"""A budget of the invariant path: kept on inputs that no step saw, asked for on the command line, and resumed."""

import copy
import csv
import json
import re

import pytest
import torch
from recipe_helpers import SHORT, killed, without_cost

from fipoptim import FIPPath
from fipoptim.anchors.held_outputs import HeldOutputs
from recipes.common.data import load_pair
from recipes.common.networks import digits_mlp
from recipes.common.training import accuracy, adam_one_cycle, minibatches, seed_everything, train
from recipes.continual.methods import make_learner
from recipes.continual.methods.fip import PathOptions
from recipes.continual.methods.plain import Plain
from recipes.continual.settings import ContinualSettings
from recipes.new_task import command as new_task
from recipes.split_tasks import command as split_tasks
from recipes.split_tasks import sequence

# Steps of this length change predictions, so that there is something to settle.
TOO_LONG = ["--beta", "auto", "--eps", "2", "--max-flips", "0.05", "--max-products", "2"]
BUDGET = [*SHORT, "--epochs", "1", "--baseline-epochs", "1", "--method", "fip", "naive"]
BUDGET += [*TOO_LONG, "--anchors", "60", "--keep-networks"]


@pytest.fixture(scope="module")
def tasks():
    return load_pair("digits-low", "digits-high")


@pytest.fixture(scope="module")
def start(tasks):
    """A network that knows the first task."""
    seed_everything(0)
    model = digits_mlp(10)
    optimizer, scheduler = adam_one_cycle(model, lr=3e-3, steps=105)
    train(model, minibatches(tasks[0], batch_size=32, epochs=5, seed=0), optimizer, scheduler)
    return model


@pytest.fixture(scope="module")
def budget_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("budget")
    assert new_task.main(["--out", str(out), *BUDGET]) == 0
    return out


def learner(model, seed=0, anchors=150, **options):
    options = PathOptions(max_products=2, **options)
    settings = ContinualSettings(anchors=anchors, methods={"fip": options})
    return make_learner("fip", model, settings, augment=None, seed=seed, freeze_batch_norm=True)


def changed(model, start, inputs):
    """The share of predictions, over the whole head, that are not those of the start network."""
    with torch.no_grad():
        before, after = (network.eval()(inputs).argmax(dim=1) for network in (start, model))
    return float((before != after).double().mean())


@pytest.mark.parametrize(("seed", "epochs"), [(0, 3), (1, 1), (2, 1), (3, 1), (4, 1)])
def test_the_budget_holds_on_inputs_that_no_step_saw(seed, epochs, tasks, start, capsys):
    low, high = tasks
    inputs, labels = low.train_inputs[:300], low.train_labels[:300]
    model = copy.deepcopy(start)
    made = learner(model, seed, anchors=300, beta="auto", max_flips=0.01, eps=0.8)
    made.remember(inputs, labels)
    anchors = made.known_anchors()
    assert (len(anchors), len(anchors.check)) == (200, 100)
    # Both together are the remembered inputs, each once.
    both = torch.cat([anchors.inputs, anchors.check.inputs]).flatten(1)
    assert sorted(both.tolist()) == sorted(inputs.flatten(1).tolist())
    batches = minibatches(high, batch_size=32, epochs=epochs, seed=seed + 1)
    made.learn(batches, steps=21 * epochs)
    assert changed(model, start, anchors.check.inputs) <= 0.01
    assert made.counted().flips == changed(model, start, anchors.check.inputs)
    assert epochs == 1 or accuracy(model, high.test_inputs, high.test_labels) > 50
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert re.match(r"invariant path, settled: drift .* flips .* \(within the budget; ", printed[0])


def test_settling_is_what_keeps_the_budget(tasks, start, capsys):
    low, high = tasks
    model = copy.deepcopy(start)
    made = learner(model, beta=100.0, eps=2.0, max_flips=0.01)
    made.remember(low.train_inputs[:150], low.train_labels[:150])
    made.learn(minibatches(high, batch_size=32, epochs=1, seed=1), steps=21)
    before = re.search(r"flips ([\d.]+)% -> ([\d.]+)%", capsys.readouterr().out)
    assert float(before[1]) > 1.0 >= float(before[2])
    assert changed(model, start, made.known_anchors().check.inputs) <= 0.01


@pytest.mark.parametrize(("check", "counted"), [(0.0, 30), (None, 10)])
def test_a_budget_of_drift_counts_where_it_was_asked_to(check, counted, tasks, start):
    low, high = tasks
    model = copy.deepcopy(start)
    made = learner(model, anchors=30, max_drift=0.5, check=check)
    made.remember(low.train_inputs[:30], low.train_labels[:30])
    made.learn(minibatches(high, batch_size=64, epochs=1, seed=1), steps=10)
    inputs = made.known_anchors().counted.inputs
    assert len(inputs) == counted
    with torch.no_grad():
        moved = (model.eval()(inputs) - start.eval()(inputs)).square().sum(dim=1).mean()
    assert 0 < float(moved) <= 0.5 * (1 + 1e-5)


def test_without_a_budget_nothing_is_set_aside_and_nothing_is_printed(tasks, start, capsys):
    low, high = tasks
    made = learner(copy.deepcopy(start))
    made.remember(low.train_inputs[:30], low.train_labels[:30])
    made.learn(minibatches(high, batch_size=100, epochs=1, seed=1), steps=6)
    assert made.known_anchors().check is None
    assert made.counted() is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("held", [None, (0, 10)])
def test_a_learner_with_check_inputs_goes_on_where_it_was_saved(held, tasks, start):
    low, high = tasks
    found = []
    for resumed in (False, True):
        model = copy.deepcopy(start)
        made = learner(model, anchors=40, beta="auto", max_flips=0.1)
        made.remember(low.train_inputs[:40], low.train_labels[:40], held)
        if resumed:
            state = made.state()
            made = learner(model, anchors=40, beta="auto", max_flips=0.1)
            made.load(state)
        made.remember(low.train_inputs[40:80], low.train_labels[40:80], held)
        anchors = made.known_anchors()
        assert (len(anchors), len(anchors.check)) == (54, 26)
        assert isinstance(anchors.model, HeldOutputs) == (held is not None)
        made.learn(minibatches(high, batch_size=100, epochs=1, seed=1), steps=6)
        found.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))


# From the command line to the files


def test_the_report_says_what_was_kept(budget_run, tmp_path, capsys):
    results = json.loads((budget_run / "results.json").read_text())
    config, metrics = results["config"], results["metrics"]
    assert (config["beta"], config["max_flips"], config["check"]) == ("auto", 0.05, None)
    assert metrics["flips_counted"] <= 0.05
    assert 0 <= metrics["flips_held_out"] < metrics["flips_held_out_at_most"] < 1
    assert metrics["baselines"]["naive"]["flips_held_out"] > metrics["flips_held_out"]
    assert (budget_run / "budget.png").read_bytes().startswith(b"\x89PNG")
    with (budget_run / "path.csv").open() as file:
        rows = list(csv.DictReader(file))
    path = [row for row in rows if row["method"] == "fip"]
    assert float(path[0]["flips"]) == float(path[0]["counted"]) == 0
    assert float(path[-1]["flips"]) == metrics["flips_held_out"]
    assert {row["counted"] for row in rows if row["method"] == "naive"} == {""}
    # The same again, from what the run left.
    capsys.readouterr()
    assert new_task.main(["--out", str(budget_run), *BUDGET, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "Certificate on 226 inputs, with 95 % confidence" in printed
    bound = f"At most {metrics['flips_held_out_at_most']:.2%} of all predictions on digits-low"
    assert bound in printed
    assert "settled" not in printed


def test_the_last_network_that_is_kept_and_tested_is_the_settled_one(budget_run, tasks):
    low, high = tasks
    with (budget_run / "path.csv").open() as file:
        row = [row for row in csv.DictReader(file) if row["method"] == "fip"][-1]
    path = FIPPath.open(budget_run / "networks")
    assert path.steps[-1] == int(row["step"])
    before, after = digits_mlp(), digits_mlp()
    path.load_into(before, 0)
    path.load_into(after, -1)
    assert changed(after, before, low.test_inputs) == float(row["flips"])
    assert accuracy(after, high.test_inputs, high.test_labels) == float(row["task2"])


def test_an_interrupted_run_with_a_budget_goes_on_to_the_same_result(
    budget_run, tmp_path, monkeypatch
):
    arguments = ["--out", str(tmp_path), *BUDGET]
    with monkeypatch.context() as patched:
        patched.setattr(Plain, "learn", killed)
        assert new_task.main(arguments) == 130
    assert new_task.main([*arguments, "--resume"]) == 0
    assert without_cost(tmp_path) == without_cost(budget_run)
    assert (tmp_path / "path.csv").read_text() == (budget_run / "path.csv").read_text()


def test_tasks_in_turn_keep_a_budget_and_are_resumed(tmp_path, monkeypatch, capsys):
    options = ["--first-epochs", "2", "--epochs", "1", "--anchors", "30", "--no-progress"]
    options += ["--method", "fip", "--hold", "all", *TOO_LONG, "--tasks", "3"]
    assert split_tasks.main(["--out", str(tmp_path / "whole"), *options]) == 0
    assert capsys.readouterr().out.count("within the budget") == 2
    test, begun = sequence.SequenceRun.test_earlier_tasks, []

    def interrupted(self, k, *rest):
        begun.append(k)
        if k == 2:
            raise KeyboardInterrupt
        return test(self, k, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(sequence.SequenceRun, "test_earlier_tasks", interrupted)
        assert split_tasks.main(["--out", str(tmp_path / "parts"), *options]) == 130
    assert begun == [1, 2]
    assert split_tasks.main(["--out", str(tmp_path / "parts"), *options, "--resume"]) == 0
    there, here = (
        json.loads((tmp_path / name / "results.json").read_text())["metrics"]
        for name in ("whole", "parts")
    )
    assert here["after_each_task"] == there["after_each_task"]
    assert here["drift_held_out"] == there["drift_held_out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--beta auto", "argument --beta: auto needs a budget; give --max-flips or --max-drift"),
        ("--beta some", "argument --beta: 'some' is not a finite number"),
        ("--check 0.3", "argument --check: 0.3 needs a budget; give --max-flips or --max-drift"),
        ("--max-flips 0.1 --check 1", "argument --check: 1 is out of range"),
        ("--max-flips 1", "argument --max-flips: 1 is out of range: give 0 or more, less than 1"),
        ("--max-flips -0.1", "argument --max-flips"),
        ("--max-flips 0.1 --anchors 1", "argument --check: 0.333 of 1 remembered inputs is 0"),
        (
            "--max-drift 1 --anchors 9 --anchor-batch 8",
            "argument --anchor-batch: 8 is more than the 6 anchors that are left",
        ),
    ],
)
def test_a_budget_that_cannot_be_is_told_before_anything_runs(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        new_task.main(["--out", str(tmp_path / "out"), *options.split()])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_flips_over_a_part_of_the_head_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        split_tasks.main(["--out", str(tmp_path / "out"), "--max-flips", "0.1"])
    assert exit.value.code == 2
    assert (
        "argument --max-flips: an old class may be taken for a new one" in capsys.readouterr().err
    )
