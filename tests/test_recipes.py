"""The recipes: their data, networks and training, and recipes.new_task from its command line to its files."""

import csv
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks import trade_off
from recipes.common import data, files, report
from recipes.common.data import DATASETS, DataError, Task, load_pair, load_task
from recipes.common.networks import digits_mlp, network_for, paper_cnn
from recipes.common.training import (
    accuracy,
    adam_one_cycle,
    minibatches,
    scores,
    seed_everything,
    steps_of,
    train,
    training_mode,
)
from recipes.continual import learners
from recipes.continual import tables as continual_tables
from recipes.continual.tables import Row
from recipes.diversity import command as diversity
from recipes.new_task import command as new_task
from recipes.new_task import experiment, learning
from recipes.new_task.settings import DEFAULTS
from recipes.sparsify import command as sparsify
from recipes.split_tasks import command as split_tasks

METRICS = {
    "task1_before",
    "task1_after",
    "task1_worst_on_path",
    "task2_after",
    "mean_after",
    "drift",
    "seconds",
}
SHORT = ["--epochs", "2", "--task1-epochs", "2", "--anchors", "20", "--no-progress"]
SHORT += ["--baseline-epochs", "2"]


# Data


def test_two_tasks_share_one_head():
    low, high = load_pair("digits-low", "digits-high")
    assert low.train_labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert high.train_labels.unique().tolist() == [5, 6, 7, 8, 9]
    swapped_high, swapped_low = load_pair("digits-high", "digits-low")
    assert swapped_high.test_labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert swapped_low.test_labels.unique().tolist() == [5, 6, 7, 8, 9]
    assert torch.equal(swapped_low.test_inputs, low.test_inputs)


@pytest.mark.parametrize("name", ["digits-low", "digits-high"])
def test_digits_are_normalised_and_split_once(name):
    task = load_task(name)
    assert task.train_inputs.shape[1:] == (1, 8, 8)
    assert task.train_inputs.dtype == torch.float32
    assert abs(float(task.train_inputs.mean())) < 1e-3
    assert abs(float(task.train_inputs.std()) - 1) < 1e-3
    total = len(task.train_inputs) + len(task.test_inputs)
    assert len(task.test_inputs) / total == pytest.approx(0.25, abs=0.01)
    shares = task.test_labels.bincount() / len(task.test_labels)
    assert torch.allclose(shares, torch.full((5,), 0.2), atol=0.01)  # stratified
    assert torch.equal(task.test_inputs, load_task(name).test_inputs)


@pytest.fixture
def image_root(tmp_path):
    """Files as torchvision reads them, tiny: 40 training and 20 test images of random grey levels."""
    generator = torch.Generator().manual_seed(0)
    for folder in ("MNIST", "FashionMNIST"):
        raw = tmp_path / folder / "raw"
        raw.mkdir(parents=True)
        for split, n in (("train", 40), ("t10k", 20)):
            images = torch.randint(0, 256, (n, 28, 28), generator=generator, dtype=torch.uint8)
            labels = torch.arange(n, dtype=torch.uint8) % 10
            for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
                header = bytes([0, 0, 8, values.ndim])
                sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
                content = header + sizes + values.numpy().tobytes()
                (raw / f"{split}-{kind}-ubyte").write_bytes(content)
    return tmp_path


def test_torchvision_tasks_are_twenty_classes(image_root):
    mnist, fashion = load_pair("mnist", "fashion-mnist", data_root=image_root)
    assert mnist.train_inputs.shape == (40, 1, 28, 28)
    assert mnist.train_labels.unique().tolist() == list(range(10))
    assert fashion.test_labels.unique().tolist() == list(range(10, 20))
    white = float(DATASETS["mnist"].normalized(torch.ones(1, 1, 1, 1)))
    assert float(mnist.train_inputs.max()) == pytest.approx(white)


def test_colour_images_come_channels_first_and_normalised_by_channel(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)

    class Stored:
        base_folder = "cifar-10-batches-py"

        def __init__(self, root, *, train, download):
            self.data, self.targets = pixels, [0, 1, 2, 3, 4, 5]

    monkeypatch.setitem(data._TORCHVISION, "cifar10", Stored)
    task, info = load_task("cifar10"), DATASETS["cifar10"]
    assert task.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    for k in range(3):
        expected = (pixels[..., k] / 255 - info.mean[k]) / info.std[k]
        np.testing.assert_allclose(task.train_inputs[:, k].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_missing_data_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(DataError, match="--download") as error:
        load_task("mnist", data_root=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "MNIST" / "raw") in str(error.value)
    with pytest.raises(DataError, match="--download") as error:
        load_task("cifar10", data_root=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "cifar-10-batches-py") in str(error.value)


def test_unknown_and_unfitting_names():
    with pytest.raises(DataError, match="digits-low, digits-high, mnist, fashion-mnist"):
        load_task("emnist")
    with pytest.raises(DataError, match="both 'mnist'"):
        load_pair("mnist", "mnist")
    with pytest.raises(DataError, match="beside 'digits-low' choose digits-high"):
        load_pair("digits-low", "fashion-mnist")


# Networks and training


def test_paper_cnn_has_the_papers_parameters():
    model = paper_cnn()
    assert sum(p.numel() for p in model.parameters()) == 1_476_548
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 20)


def test_networks_fit_their_family():
    paired = [info for info in DATASETS.values() if info.family in DEFAULTS]
    assert len(paired) == 4
    for info in paired:
        side = {"digits": 8, "mnist": 28}[info.family]
        outputs = network_for(info.family, 2 * info.classes)(torch.randn(3, 1, side, side))
        assert outputs.shape == (3, 2 * info.classes)
        assert float(outputs.detach().abs().max()) < 2  # a head that starts undecided


def blobs(n=200):
    """Two classes, told apart by the sign of the mean."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    inputs = torch.randn(n, 1, 8, 8, generator=generator) + (2.0 * labels - 1).reshape(-1, 1, 1, 1)
    return Task("blobs", 2, 0, inputs, labels, inputs, labels)


def test_plain_training_learns():
    seed_everything(0)
    task, model = blobs(), digits_mlp(2)
    steps: list[int] = []
    optimizer, scheduler = adam_one_cycle(model, lr=1e-3, steps=40)
    batches = minibatches(task, batch_size=20, epochs=4, seed=0)
    seconds = train(model, batches, optimizer, scheduler, after_step=steps.append)
    assert steps == list(range(1, 41))
    assert seconds > 0
    assert accuracy(model, task.test_inputs, task.test_labels, batch_size=33) > 99


@pytest.mark.parametrize(
    ("momentum", "lowest", "highest"), [(None, 0.85, 0.95), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)]
)
def test_adams_first_beta_cycles_unless_it_is_given(momentum, lowest, highest):
    optimizer, scheduler = adam_one_cycle(digits_mlp(2), lr=1e-3, steps=20, momentum=momentum)
    found = []
    for _ in range(20):
        found.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        scheduler.step()
    assert (min(found), max(found)) == pytest.approx((lowest, highest), abs=1e-3)


def test_minibatches_are_full_and_repeatable():
    task = blobs(50)
    first, again = (list(minibatches(task, batch_size=20, epochs=3, seed=1)) for _ in range(2))
    assert [len(x) for x, _ in first] == [20] * 6
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert len(torch.cat([first[0][0], first[1][0]]).unique(dim=0)) == 40  # no input twice
    assert [len(x) for x, _ in minibatches(task, batch_size=80, epochs=2, seed=1)] == [50, 50]


def test_the_last_epoch_may_be_a_part():
    task = blobs(50)
    whole, part = (list(minibatches(task, batch_size=10, epochs=e, seed=1)) for e in (3, 2.4))
    assert len(part) == steps_of(task, 10, 2.4) == 12
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole, part, strict=False))
    assert len(list(minibatches(task, batch_size=10, epochs=0.01, seed=1))) == 1


def test_frozen_batch_norm_keeps_its_statistics():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2))
    task = blobs()
    before = model[0].running_mean.clone()
    for frozen in (True, False):
        optimizer, scheduler = adam_one_cycle(model, lr=1e-3, steps=10)
        batches = minibatches(task, batch_size=20, epochs=1, seed=0)
        train(model, batches, optimizer, scheduler, freeze_batch_norm=frozen)
        assert torch.equal(model[0].running_mean, before) == frozen


def test_accuracy_within_a_task_and_scores():
    model = nn.Identity()
    z = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0], [9.0, 0.0, 0.0, 1.0]])
    labels = torch.tensor([2, 3, 3])
    assert accuracy(model, z, labels) == pytest.approx(100 / 3)
    assert accuracy(model, z, labels, classes=(2, 4), batch_size=2) == pytest.approx(100)
    assert accuracy(model, z, labels, classes=(0, 3)) == pytest.approx(0)
    expected = z.double().exp() / z.double().exp().sum(dim=1, keepdim=True)
    found = scores(model, z, labels)
    assert torch.allclose(found.double(), expected[torch.arange(3), labels], atol=1e-6)


def test_accuracy_leaves_the_mode_alone():
    model, task = paper_cnn(), torch.randn(5, 1, 28, 28)
    training_mode(model, freeze_batch_norm=True)
    modes = [m.training for m in model.modules()]
    accuracy(model, task, torch.zeros(5, dtype=torch.long))
    assert [m.training for m in model.modules()] == modes


# The recipe


def test_tested_steps_are_dense_after_the_switch():
    assert learning.tested_steps(5) == [0, 1, 2, 3, 4, 5]
    steps = learning.tested_steps(1200)
    assert steps[:10] == [0, 1, 2, 3, 5, 10, 20, 50, 60, 100]
    assert steps[-1] == 1200
    assert 25 <= len(steps) <= 30


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    arguments = ["--task1", "digits-low", "--task2", "digits-high", "--out", str(out), *SHORT]
    assert new_task.main([*arguments, "--keep-networks"]) == 0
    return out


def test_results_hold_what_they_promise(digits_run):
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
    assert not list(digits_run.glob(".*"))  # nothing half-written


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


def without_cost(folder):
    """The results but for what a machine makes of them."""
    results = json.loads((folder / "results.json").read_text())
    for metrics in (results["metrics"], *results["metrics"]["baselines"].values()):
        metrics.pop("seconds")
        metrics.pop("peak_megabytes", None)
    return results


def test_the_same_seed_gives_the_same_results(digits_run, tmp_path):
    assert new_task.main(["--out", str(tmp_path), *SHORT]) == 0
    assert without_cost(tmp_path) == without_cost(digits_run)


def test_several_seeds_are_averaged_and_compared_pair_by_pair(tmp_path, capsys):
    assert new_task.main(["--out", str(tmp_path), *SHORT, "--seeds", "1", "2"]) == 0
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
        "--max-drift 0.01 --anchor-batch 10",
    ],
)
def test_options_reach_the_optimizer(options, tmp_path):
    assert new_task.main(["--out", str(tmp_path), *SHORT, *options.split()]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    if "--max-drift" in options:
        with (tmp_path / "path.csv").open() as file:
            drifts = [float(row["drift"]) for row in csv.DictReader(file) if row["method"] == "fip"]
        assert max(drifts) <= results["config"]["max_drift"] == 0.01


def test_validation_never_sees_the_test_part(tmp_path, monkeypatch):
    task = load_task("digits-low")
    held = task.held_out(0.25)
    assert len(held.test_inputs) == round(0.25 * len(task.train_inputs))
    both = torch.cat([held.train_inputs, held.test_inputs]).flatten(1)
    assert torch.equal(both.unique(dim=0), task.train_inputs.flatten(1).unique(dim=0))
    assert torch.equal(held.test_inputs, task.held_out(0.25).test_inputs)
    assert new_task.main(["--out", str(tmp_path), *SHORT, "--validation", "0.25"]) == 0
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


def test_all_methods_run_side_by_side(tmp_path):
    arguments = [
        "--out",
        str(tmp_path),
        *SHORT,
        "--method",
        "all",
        "--seeds",
        "0",
        "1",
        "--augment",
    ]
    assert new_task.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    baselines = results["metrics"]["baselines"]
    others = ["replay", "ewc", "gem", "lwf"]
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


@pytest.mark.parametrize("method", [m for m in learners.METHODS if m != "fip"])
@pytest.mark.parametrize("momentum", [None, 0.5])
def test_the_first_beta_of_every_method_is_the_one_it_was_given(method, momentum):
    """Adam's cycles unless it is given, Muon's is 0.95."""
    task, model, seen = blobs(), digits_mlp(2), set()
    tuned = {method: learners.Tuning(1e-3, 1.0, momentum)}
    settings = learners.Settings(anchors=20, beta=1.0, eps=1.0, max_products=1, tuning=tuned)
    learner = learners.learner(
        method, model, settings, augment=None, seed=0, freeze_batch_norm=False
    )

    def watch(optimizer, args, kwargs):
        seen.update(group.get("momentum", group["betas"][0]) for group in optimizer.param_groups)

    learner.remember(task.train_inputs[:20], task.train_labels[:20])
    watching = register_optimizer_step_pre_hook(watch)
    learner.learn(minibatches(task, batch_size=20, epochs=4, seed=0), steps=40)
    watching.remove()
    if momentum is not None:
        assert seen == {momentum}
    elif method == "distillation-muon":
        assert seen == {0.95}
    else:
        assert (min(seen), max(seen)) == pytest.approx((0.85, 0.95), abs=1e-2)


def test_tuning_reaches_its_method_alone(tmp_path):
    arguments = ["--method", "distillation", "--distillation-strength", "0", "--replay-lr", "1"]
    arguments += ["--distillation-muon-lr", "0.5", "--distillation-momentum", "0.5"]
    assert new_task.main(["--out", str(tmp_path), *SHORT, *arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    tuned = {"lr": 1e-2, "strength": 0.0, "momentum": 0.5}
    assert results["config"]["tuning"]["distillation"] == tuned
    assert results["config"]["tuning"]["naive"]["momentum"] is None
    assert results["config"]["tuning"]["replay"]["lr"] == 1.0
    assert results["config"]["tuning"]["distillation-muon"]["lr"] == 0.5
    assert results["metrics"]["baselines"]["distillation"]["task1_after"] < 20  # nothing holds it


def test_a_method_that_is_not_installed_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "recipes.continual.avalanche_learners", None)
    with pytest.raises(SystemExit):
        new_task.main(["--out", str(tmp_path / "out"), "--method", "fip", "gem"])
    assert "gem needs avalanche-lib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_loses_the_method_in_hand_alone(
    digits_run, tmp_path, capsys, monkeypatch
):
    def interrupted(*args, **keywords):
        raise KeyboardInterrupt

    arguments = ["--out", str(tmp_path), *SHORT, "--keep-networks"]
    with monkeypatch.context() as patched:
        patched.setattr(learners.Distillation, "learn", interrupted)
        assert new_task.main(arguments) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
    finished = (tmp_path / "fip.pt").stat().st_mtime_ns

    with pytest.raises(SystemExit):
        new_task.main([*arguments, "--resume", "--beta", "3"])
    assert "beta 10.0 there, 3.0 asked for" in capsys.readouterr().err

    assert new_task.main([*arguments, "--resume"]) == 0
    assert (tmp_path / "fip.pt").stat().st_mtime_ns == finished
    assert without_cost(tmp_path) == without_cost(digits_run)
    assert (tmp_path / "path.csv").read_text() == (digits_run / "path.csv").read_text()
    for name in ("path", "bars", "scores", "weights"):
        assert (tmp_path / f"{name}.png").exists()


def killed(*args, **keywords):
    raise KeyboardInterrupt


def test_later_seeds_of_an_earlier_run_are_not_taken_for_those_of_a_killed_one(
    tmp_path, monkeypatch
):
    arguments = [*SHORT, "--method", "fip", "--seeds", "1", "2"]
    changed = [*arguments, "--beta", "3", "--task1-epochs", "1"]
    both, alone = (["--out", str(tmp_path / name)] for name in ("both", "alone"))
    assert new_task.main([*both, *arguments]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(learners.InvariantPath, "learn", killed)
        assert new_task.main([*both, *changed]) == 130
    assert new_task.main([*both, *changed, "--resume"]) == 0
    assert new_task.main([*alone, *changed]) == 0
    for seed in (1, 2):
        there, here = (tmp_path / name / f"seed-{seed}" for name in ("alone", "both"))
        assert without_cost(here) == without_cost(there)
        assert (here / "path.csv").read_text() == (there / "path.csv").read_text()


def test_a_result_belongs_to_the_configuration_that_is_stored_beside_it(
    tmp_path, capsys, monkeypatch
):
    def main(name, *options):
        return new_task.main(["--out", str(tmp_path / name), *SHORT, "--method", "fip", *options])

    def refused(*options):
        with pytest.raises(SystemExit) as exit:
            main("b", *options, "--resume")
        assert exit.value.code == 2
        return capsys.readouterr().err

    assert main("a", "--beta", "3", "--task1-epochs", "1", "--seeds", "1") == 0
    assert main("b", "--seeds", "0", "1") == 0
    theirs, ours = (tmp_path / name / "seed-1" for name in ("a", "b"))
    own = {file: file.read_bytes() for file in (ours / "fip.pt", ours / "first-task.safetensors")}
    (ours / "fip.pt").write_bytes((theirs / "fip.pt").read_bytes())
    before = (ours / "results.json").read_bytes()
    message = refused("--seeds", "0", "1")
    assert str(ours / "fip.pt") in message
    assert "another configuration (beta 3.0 there, 10.0 asked for; task1_epochs 1" in message
    assert (ours / "results.json").read_bytes() == before
    # A seed's outcome is no other's, whatever folder it is in.
    (ours / "fip.pt").write_bytes((tmp_path / "b" / "seed-0" / "fip.pt").read_bytes())
    assert "another configuration (seed 0 there, 1 asked for)" in refused("--seeds", "0", "1")
    # An outcome that says nothing serves nobody.
    torch.save({"curve": {}}, ours / "fip.pt")
    assert "does not say which configuration made it" in refused("--seeds", "1")
    (ours / "fip.pt").unlink()
    start = ours / "first-task.safetensors"
    start.write_bytes((theirs / "first-task.safetensors").read_bytes())
    assert "another configuration (task1_epochs 1 there, 2 asked for)" in refused("--seeds", "1")
    # The network after task 1 serves every run that agrees in what it depends on.
    start.write_bytes(own[start])
    monkeypatch.setattr(experiment, "learn_first_task", killed)
    assert main("b", "--seeds", "1", "--resume", "--beta", "3") == 0


@pytest.mark.parametrize("zipped", [True, False])
def test_an_outcome_of_somebody_else_runs_no_code(zipped, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "distillation.pt"  # of a method that is not asked for, too
    torch.save({"curve": Payload()}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SystemExit) as exit:
        new_task.main(["--out", str(tmp_path / "out"), *SHORT, "--method", "fip", "--resume"])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert f"{file} holds more than tensors and plain values" in message
    assert "weights_only" not in message  # nobody is told how to run it
    assert not (tmp_path / "owned").exists()


def test_networks_of_another_run_are_not_taken_for_those_of_a_finished_path(tmp_path, capsys):
    def main(*options):
        return new_task.main(["--out", str(tmp_path), *SHORT, "--method", "fip", *options])

    assert main("--keep-networks", "--beta", "3") == 0
    kept = (tmp_path / "networks").stat().st_mtime_ns
    assert main() == 0
    with pytest.raises(SystemExit):
        main("--keep-networks", "--resume")
    assert "networks.json is of another configuration (beta 3.0" in capsys.readouterr().err
    assert (tmp_path / "networks").stat().st_mtime_ns == kept
    shutil.rmtree(tmp_path / "networks")
    (tmp_path / "networks.json").unlink()
    with pytest.raises(SystemExit):
        main("--keep-networks", "--resume")
    assert "finished without keeping its networks" in capsys.readouterr().err
    (tmp_path / "fip.pt").unlink()
    assert main("--keep-networks", "--resume") == 0
    assert main("--keep-networks", "--resume") == 0


def test_every_list_of_seeds_names_each_once(monkeypatch, capsys, tmp_path):
    mains = [new_task.main, split_tasks.main, sparsify.main, diversity.main]
    for main in mains:
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


def test_seeds_can_be_run_one_by_one_and_put_together(tmp_path):
    arguments = ["--out", str(tmp_path), *SHORT, "--method", "fip", "--resume", "--seeds"]
    assert new_task.main([*arguments, "1"]) == 0
    assert new_task.main([*arguments, "2"]) == 0
    finished = [(tmp_path / f"seed-{s}/fip.pt").stat().st_mtime_ns for s in (1, 2)]
    assert new_task.main([*arguments, "1", "2"]) == 0
    assert [(tmp_path / f"seed-{s}/fip.pt").stat().st_mtime_ns for s in (1, 2)] == finished
    both = json.loads((tmp_path / "results.json").read_text())
    assert both["config"]["seeds"] == [1, 2]


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    keywords = {"recipe": "r", "config": {}, "environment": {}}
    with pytest.raises(TypeError):
        report.write_results(path, metrics={"unwritable": object()}, **keywords)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_tables_show_what_is_known():
    rows = [Row("accuracy", "accuracy (%)", ".2f", compared=True), Row("peak", "peak (MB)", ".0f")]
    path = [{"accuracy": 0.25, "peak": None}, {"accuracy": 0.75, "peak": None}]
    other = [{"accuracy": 0.25, "peak": 1.0}, {"accuracy": 1.0, "peak": 3.0}]
    one = continual_tables.summary({"fip": path[:1], "ewc": other[:1]}, rows)
    assert "±" not in one
    text = continual_tables.summary({"fip": path, "ewc": other}, rows)
    beside, paired = text.split("paired differences")
    for shown in ("0.50 ± 0.35", "unknown", "2 ± 1"):
        assert shown in beside
    assert "-0.12 ± 0.12" in paired
    assert "peak" not in paired
    for part in (beside.rstrip(), paired.split("\n", 1)[1]):
        assert len({len(line) for line in part.splitlines()}) == 1  # aligned
    assert "paired" not in continual_tables.summary({"ewc": path, "gem": other}, rows)


def test_json_has_innermost_lists_and_mappings_on_a_line(tmp_path):
    content = {
        "rows": [[1.5, None, 3], [], [math.pi]],
        "names": ["a", "[\n  1,\n  2]", '"],  ['],
        "runs": [{"seed": 0, "of": [1, 2, True]}, {"seed": 1, "found": 0.25}],
    }
    files.write_json(tmp_path / "a.json", content)
    assert files.read_json(tmp_path / "a.json") == content
    lines = [line.strip() for line in (tmp_path / "a.json").read_text().splitlines()]
    assert {"[1.5, null, 3],", '"of": [1, 2, true]', '{"seed": 1, "found": 0.25}'} <= {*lines}


def test_paired_differences_need_the_same_seeds():
    with pytest.raises(ValueError, match="shorter"):
        report.paired([{"a": 1.0}, {"a": 2.0}], [{"a": 1.0}])
