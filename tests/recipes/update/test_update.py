"""``recipes.update`` from end to end: the budgets, what is counted, and what a resumed run takes over."""

import json

import pytest
import torch
from update_cases import SHORT, case_of, network, run

from recipes.update.command import main
from recipes.update.methods import METHODS, gradient, register


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("update")
    return folder, run(folder)


def classes_of(model, inputs):
    with torch.no_grad():
        return model(inputs).argmax(dim=1)


def test_every_budget_holds_on_the_check_inputs(finished):
    folder, results = finished
    case = case_of(folder)
    old = network(folder, "old", classes=5)
    for method in ("fip", "interpolation"):
        for budget, found in zip((0.01, 0.05), results["metrics"][method], strict=True):
            updated = network(folder, f"{method}-{100 * budget:g}")
            flips = classes_of(old, case.check) != classes_of(updated, case.check)
            assert float(flips.double().mean()) <= budget
            (one,) = found["runs"]
            assert one["check_flips"] == int(flips.sum())
            assert one["budget"] == budget
            assert one["within"] is True


def test_flips_and_accuracies_are_counted_once_more(finished):
    folder, results = finished
    task = case_of(folder).task
    labels, is_old = task.test_labels, task.test_labels < 5
    before = classes_of(network(folder, "old", classes=5), task.test_inputs)
    assert set(results["metrics"]) == set(METHODS)
    files = {"plain": ["plain"], "focal": ["focal"], "fip": ["fip-1", "fip-5"]}
    for method, names in files.items():
        for name, entry in zip(names, results["metrics"][method], strict=True):
            (found,) = entry["runs"]
            now = classes_of(network(folder, name), task.test_inputs)
            right, was_right = now == labels, before == labels
            negative = int((was_right & ~right & is_old).sum())
            assert found["negative_flips"] == negative
            rate = negative / int(is_old.sum())
            assert found["negative_flip_rate"] == pytest.approx(100 * rate)
            chance = float(was_right[is_old].double().mean() * (~right)[is_old].double().mean())
            relative = rate / chance if chance else 0.0
            assert found["relative_negative_flip_rate"] == pytest.approx(100 * relative)
            assert found["accuracy"] == pytest.approx(100 * float(right.double().mean()))
            new = right[~is_old].double().mean()
            assert found["accuracy_new"] == pytest.approx(100 * float(new))
            certified = found["certificate"]["overall"]["negative_flips"]
            assert certified["count"] == negative
            assert certified["bound"] > rate


def test_new_classes_are_learnt(finished):
    _, results = finished
    for method in ("fip", "plain"):
        assert results["metrics"][method][-1]["accuracy_new"] > 50


def test_methods_that_start_from_plain_training_share_it(finished):
    folder, results = finished
    plain, interpolated = network(folder, "plain"), network(folder, "interpolation-5")
    (found,) = results["metrics"]["interpolation"][1]["runs"]
    start = case_of(folder).start
    for a, b, c in zip(
        start.parameters(), plain.parameters(), interpolated.parameters(), strict=True
    ):
        torch.testing.assert_close(c, torch.lerp(a, b, found["account"]["share"]))
    (ensemble,) = results["metrics"]["ensemble"][0]["runs"]
    (alone,) = results["metrics"]["plain"][0]["runs"]
    assert ensemble["seconds"] == alone["seconds"]


def test_a_resumed_run_trains_nothing_that_is_there(finished, monkeypatch):
    folder, results = finished

    def fail(*args, **keywords):
        raise AssertionError("trained again")

    monkeypatch.setattr(gradient, "learn", fail)
    (folder / "seed-0" / "interpolation.json").unlink()  # takes the plain network from its file
    assert main([*SHORT, "--resume", "--out", str(folder)]) == 0
    again = json.loads((folder / "results.json").read_text())
    for before, now in zip(
        results["metrics"]["interpolation"], again["metrics"]["interpolation"], strict=True
    ):
        assert now["negative_flip_rate"] == before["negative_flip_rate"]
        assert now["accuracy"] == before["accuracy"]


def test_another_budget_keeps_the_old_network_and_refuses_the_results(finished, capsys):
    folder, _ = finished
    with pytest.raises(SystemExit) as stop:
        main([*SHORT, "--max-flips", "0.2", "--resume", "--out", str(folder)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "max_flips [0.01, 0.05] there, [0.2] asked for" in said
    assert "old.safetensors" not in said


def test_two_seeds_are_averaged_and_drawn(tmp_path, rendered, capsys):
    results = run(tmp_path, "--seeds", "0", "1", "--method", "plain", "interpolation")
    (plain,) = results["metrics"]["plain"]
    accuracies = [one["accuracy"] for one in plain["runs"]]
    assert plain["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert plain["deviations"]["accuracy"] == pytest.approx(
        abs(accuracies[0] - accuracies[1]) / 2**0.5
    )
    assert (tmp_path / "trade_off.png").stat().st_size > 10_000
    assert "interpolation of weights, 5 %" in capsys.readouterr().out


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'fip' is registered already"):
        register("fip", METHODS["plain"])
