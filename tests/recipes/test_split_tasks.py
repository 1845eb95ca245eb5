"""recipes.split_tasks: the tasks, the measures, interruptions, and the command line."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from recipes.common.data import DataError, load_task, split
from recipes.common.process_memory import PeakMemory
from recipes.common.training import accuracy
from recipes.continual.methods import METHODS
from recipes.split_tasks import command as split_tasks
from recipes.split_tasks import experiment, separate, sequence
from recipes.split_tasks.sequence import Record, within

SHORT = ["--first-epochs", "3", "--epochs", "1", "--baseline-epochs", "2", "--anchors", "10"]
SHORT += ["--no-progress"]


def run(out, *options):
    return split_tasks.main(["--out", str(out), *SHORT, *options])


def results(out):
    found = json.loads((out / "results.json").read_text())
    for metrics in (found["metrics"], *found["metrics"]["baselines"].values()):
        for name in ("seconds", "peak_megabytes"):
            metrics.pop(name, None)
            for part in (metrics.get("deviations", {}), metrics.get("path_less_this", {})):
                part.pop(name, None)
            for run in metrics.get("by_seed", []):
                run.pop(name, None)
    return found


# Tasks and their loss


def test_a_data_set_is_split_in_the_order_of_its_labels():
    digits = load_task("digits")
    tasks = split(digits, 2)
    assert [t.class_range for t in tasks] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    for task in tasks:
        first, end = task.class_range
        assert set(task.train_labels.tolist()) == set(range(first, end))
        assert set(task.test_labels.tolist()) == set(range(first, end))
    assert sum(len(t.train_inputs) for t in tasks) == len(digits.train_inputs)
    with pytest.raises(DataError, match="10 classes of digits do not divide into tasks of 3"):
        split(digits, 3)


def test_the_loss_is_among_the_classes_of_each_inputs_own_task():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 8, generator=generator)
    labels = torch.tensor([0, 1, 3, 4, 7, 6])
    expected = 0.0
    for row, label in zip(z, labels.tolist(), strict=True):
        first = label - label % 2
        expected += float(F.cross_entropy(row[None, first : first + 2], torch.tensor([label % 2])))
    assert float(within(2)(z, labels)) == pytest.approx(expected / 6, rel=1e-5)


def test_the_measures_of_a_run_follow_their_definitions():
    record = Record(
        within_task=[[90.0], [80.0, 70.0], [60.0, 75.0, 100.0]],
        all_classes=[[90.0], [10.0, 70.0], [0.0, 20.0, 100.0]],
        visited=[(1, 1, [85.0]), (2, 1, [70.0, 50.0]), (2, 9, [60.0, 75.0])],
        drift_held_out=[1.0, 2.0],
        seconds=[3.0, 4.0],
        remembered=2_000_000,
    )
    metrics = record.metrics()
    assert metrics["within_task"] == pytest.approx(235 / 3)
    assert metrics["all_classes"] == pytest.approx(40)
    assert metrics["backward_transfer"] == pytest.approx((60 - 90 + 75 - 70) / 2)
    assert metrics["worst_on_path"] == 50
    assert metrics["drift_held_out"] == 2
    assert metrics["seconds"] == 7
    assert metrics["remembered_megabytes"] == 2
    assert metrics["peak_megabytes"] is None


def test_peak_memory_counts_memory_that_was_freed_again():
    with PeakMemory(torch.device("cpu")) as small:
        pass
    with PeakMemory(torch.device("cpu")) as large:
        torch.ones(50_000_000).sum()
    if small.peak is None:  # this system does not report its peak memory
        assert large.peak is None
    else:
        assert large.peak - small.peak > 150e6


# The recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert run(out, "--method", "all", "--seeds", "0", "1") == 0
    return out


def test_all_methods_go_through_all_tasks(finished):
    found = results(finished)
    assert found["recipe"] == "split_tasks"
    assert found["config"]["tasks"] == 5
    everyone = {"fip": found["metrics"], **found["metrics"]["baselines"]}
    assert list(everyone) == list(METHODS)
    for metrics in everyone.values():
        rows = metrics["after_each_task"]
        assert [[len(row) for row in seed] for seed in rows] == [[1, 2, 3, 4, 5]] * 2
        last = [sum(seed[-1]) / 5 for seed in rows]
        assert metrics["within_task"] == pytest.approx(sum(last) / 2)
        assert metrics["within_task"] >= metrics["all_classes"]
        assert metrics["worst_on_path"] <= 100
        # All methods start from the same network.
        assert rows[0][0] == found["metrics"]["after_each_task"][0][0]
    assert everyone["naive"]["remembered_megabytes"] == 0
    for name in ("tasks", "bars", "scores", "weights"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_to_the_same_result(method, finished, tmp_path, monkeypatch):
    learn, begun = sequence.SequenceRun.test_earlier_tasks, []

    def interrupted(self, k, steps, progress):
        begun.append(k)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return learn(self, k, steps, progress)

    with monkeypatch.context() as patch:
        patch.setattr(sequence.SequenceRun, "test_earlier_tasks", interrupted)
        assert run(tmp_path, "--method", method) == 130
    assert not (tmp_path / "results.json").exists()
    begun.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            sequence.SequenceRun,
            "test_earlier_tasks",
            lambda self, k, *rest: begun.append(k) or learn(self, k, *rest),
        )
        assert run(tmp_path, "--method", method, "--resume") == 0
    assert begun == [3, 4]  # finished tasks are not learnt again
    there, here = results(finished)["metrics"], results(tmp_path)["metrics"]
    if method != "fip":
        there, here = there["baselines"][method], here["baselines"][method]
    assert here["after_each_task"][0] == there["after_each_task"][0]
    state, again = (
        torch.load(out / "seed-0" / f"{method}.pt", weights_only=True)
        for out in (finished, tmp_path)
    )
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, again["model"][name]), name
    assert state["record"]["visited"] == again["record"]["visited"]


def test_another_configuration_is_refused_with_the_difference(finished, capsys):
    before = (finished / "results.json").read_bytes()
    with pytest.raises(SystemExit) as exit:
        run(finished, "--resume", "--beta", "3", "--method", "naive", "--ewc-lr", "0.5")
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "beta 10.0 there, 3.0 asked for" in message
    assert "tuning" in message
    assert "choose another --out" in message
    assert (finished / "results.json").read_bytes() == before


def test_a_result_belongs_to_the_configuration_that_is_stored_beside_it(tmp_path, capsys):
    def refused(*options):
        with pytest.raises(SystemExit) as exit:
            run(tmp_path / "b", "--method", "naive", *options, "--resume")
        assert exit.value.code == 2
        return capsys.readouterr().err

    assert run(tmp_path / "a", "--method", "naive", "--naive-lr", "0.01") == 0
    assert run(tmp_path / "b", "--method", "naive") == 0
    for name, options, difference in (
        ("naive.pt", (), "tuning"),
        ("first-task.safetensors", ("--first-epochs", "1"), "first_epochs 3 there, 1 asked for"),
    ):
        file = tmp_path / "b" / "seed-0" / name
        own = file.read_bytes()
        file.write_bytes((tmp_path / "a" / "seed-0" / name).read_bytes())
        if name == "first-task.safetensors":
            (tmp_path / "b" / "seed-0" / "naive.pt").unlink()
        message = refused(*options)
        assert str(file) in message
        assert f"another configuration ({difference}" in message
        file.write_bytes(own)
    # The number of classes of a task is part of the configuration.
    assert run(tmp_path / "b", "--method", "naive", "--tasks", "2") == 0
    assert "classes 2 there, 1 asked for" in refused("--tasks", "2", "--classes", "1")
    # The network of the first task is reused if only settings of later tasks differ.
    (tmp_path / "b" / "seed-0" / "naive.pt").unlink()
    start = (tmp_path / "b" / "seed-0" / "first-task.safetensors").stat().st_mtime_ns
    options = ("--tasks", "2", "--naive-lr", "0.01", "--resume")
    assert run(tmp_path / "b", "--method", "naive", *options) == 0
    assert (tmp_path / "b" / "seed-0" / "first-task.safetensors").stat().st_mtime_ns == start


def test_results_of_later_seeds_of_an_earlier_run_are_not_reused_by_an_interrupted_one(
    tmp_path, monkeypatch
):
    seeds = ("--method", "naive", "--seeds", "0", "1")
    changed = ("--baseline-epochs", "3")
    assert run(tmp_path / "both", *seeds) == 0

    def killed(*args, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "learn_sequence", killed)
        assert run(tmp_path / "both", *seeds, *changed) == 130
    assert run(tmp_path / "both", *seeds, *changed, "--resume") == 0
    assert run(tmp_path / "alone", *seeds, *changed) == 0
    assert results(tmp_path / "both") == results(tmp_path / "alone")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_somebody_else_runs_no_code(zipped, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    file = tmp_path / "out" / "seed-0" / "gem.pt"
    file.parent.mkdir(parents=True)
    state = {"model": Payload(), "learner": Payload()}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "out", "--method", "gem", "--resume")
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert f"{file} holds more than tensors and plain values" in message
    assert "weights_only" not in message  # the message does not tell how to run the code
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK"])
def test_a_damaged_checkpoint_is_named(content, tmp_path, capsys):
    file = tmp_path / "seed-0" / "naive.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        run(tmp_path, "--method", "naive", "--resume")
    assert exit.value.code == 2
    assert str(file) in capsys.readouterr().err


def test_a_run_without_resume_starts_over(tmp_path):
    assert run(tmp_path, "--method", "naive") == 0
    first = results(tmp_path)
    assert run(tmp_path, "--method", "naive", "--first-epochs", "1") == 0
    assert results(tmp_path)["config"]["first_epochs"] == 1
    assert results(tmp_path)["metrics"] != first["metrics"]


@pytest.mark.parametrize("options", ["--loss-over all", "--augment --anchor-batch 30 --shift"])
def test_options_are_taken(options, tmp_path, rendered):
    assert run(tmp_path, "--method", "fip", "distillation", *options.split()) == 0
    config = results(tmp_path)["config"]
    assert config["loss_over"] == ("all" if "all" in options else "task")
    assert config["augment"] == ("--augment" in options)


def test_tasks_limits_the_run_to_the_first_tasks(tmp_path, rendered):
    assert run(tmp_path, "--method", "naive", "--tasks", "3") == 0
    found = results(tmp_path)
    assert found["config"]["tasks"] == 3
    (after,) = found["metrics"]["baselines"]["naive"]["after_each_task"]
    assert [len(row) for row in after] == [1, 2, 3]
    start = load_file(tmp_path / "seed-0" / "first-task.safetensors")
    # The biases of the head, for three tasks.
    assert (6,) in [tuple(t.shape) for t in start.values()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "imagenet"], "choose from"),
        (["--method", "hope"], "choose from"),
        (["--classes", "3"], "do not divide into tasks of 3"),
        (["--classes", "10"], "argument --classes"),
        (["--tasks", "6"], "argument --tasks: 6 is more than the 5 there are"),
        (["--anchors", "5000"], "argument --anchors: 5000 is more than"),
        (["--budget", "full"], "argument --budget: digits has"),
        (["--data", "cifar100", "--data-root", "nowhere"], "--download"),
        (["--radius", "-1"], "argument --radius"),
        (["--seeds", "0", "1", "0"], "argument --seeds: 0 is given twice"),
    ],
)
def test_bad_input_is_told_before_anything_runs(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        split_tasks.main(options)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Batch norm with the statistics of each batch


def small(classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, classes),
    )


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_by_the_batch_is_tested_with_statistics_of_all_tasks(
    method, tmp_path, monkeypatch
):
    monkeypatch.setattr(experiment, "network", lambda data, classes: small(classes))
    assert run(tmp_path, "--method", method, "--batch-norm", "batch") == 0
    state = torch.load(tmp_path / "seed-0" / f"{method}.pt", weights_only=True)
    first = load_file(tmp_path / "seed-0" / "first-task.safetensors")
    tasks = split(load_task("digits"), 2)
    remembered = torch.cat(
        [
            task.train_inputs[
                torch.randperm(len(task.train_inputs), generator=torch.Generator().manual_seed(k))[
                    :10
                ]
            ]
            for k, task in enumerate(tasks)
        ]
    )
    model = small(10)
    model.load_state_dict(state["model"])
    assert not torch.equal(model[0].weight, first["0.weight"])
    torch.testing.assert_close(model[1].running_mean, model[0](remembered).mean(dim=(0, 2, 3)))
    found = json.loads((tmp_path / "results.json").read_text())["metrics"]
    rows = (found if method == "fip" else found["baselines"][method])["after_each_task"][0]
    last = [accuracy(model, t.test_inputs, t.test_labels, classes=t.class_range) for t in tasks]
    assert rows[-1] == pytest.approx(last)


def test_an_interrupted_run_with_batch_norm_goes_on_to_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "network", lambda data, classes: small(classes))
    options = ("--method", "fip", "--batch-norm", "batch", "--hold", "task")
    assert run(tmp_path / "whole", *options) == 0
    learn, begun = sequence.SequenceRun.test_earlier_tasks, []

    def interrupted(self, k, *rest):
        begun.append(k)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return learn(self, k, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sequence.SequenceRun, "test_earlier_tasks", interrupted)
        assert run(tmp_path / "parts", *options) == 130
    assert run(tmp_path / "parts", *options, "--resume") == 0
    there, here = (results(tmp_path / name)["metrics"] for name in ("whole", "parts"))
    assert here["after_each_task"] == there["after_each_task"]
    # The resumed run traces derivatives at another step, which rounds batch norm differently.
    assert here["drift_held_out"] == pytest.approx(there["drift_held_out"], rel=1e-3)


def test_hold_task_needs_the_logits_output_space(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--hold", "task", "--output-space", "probabilities")
    assert "--hold: task goes with --output-space logits" in capsys.readouterr().err


# A network for each task


def test_separate_networks_know_nothing_of_each_other(tmp_path, capsys, monkeypatch):
    made = []
    kept = experiment.SplitTasksExperiment.__init__

    def remembered(self, *args, **keywords):
        kept(self, *args, **keywords)
        made.append(self)

    monkeypatch.setattr(experiment.SplitTasksExperiment, "__init__", remembered)
    options = ["--out", str(tmp_path), "--epochs", "2", "--no-progress"]
    assert separate.main([*options, "--seeds", "0", "1"]) == 0
    assert "a network for each of 5 tasks" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())["metrics"]
    for mean, tasks in zip(found["within_task"], found["tasks"], strict=True):
        assert mean == pytest.approx(sum(tasks) / 5)
        assert min(tasks) > 80
    (run,) = made
    start = run.start(0)
    first = run.tasks[0]
    right = accuracy(start, first.test_inputs, first.test_labels, classes=first.class_range)
    assert found["tasks"][0][0] == right
    run.tasks[2] = run.tasks[1]  # another task before the fourth
    assert separate.accuracies_of(run, 0)[3] == found["tasks"][0][3]


def test_separate_networks_are_as_many_as_the_recipes_tasks(capsys):
    with pytest.raises(SystemExit):
        separate.main(["--data", "digits", "--budget", "full"])
    assert "digits has no budget but short" in capsys.readouterr().err
