"""The trade-off benchmark: its curve, its table, equal conditions for both methods, and resuming."""

from dataclasses import replace

import pytest
import torch

from benchmarks import trade_off
from recipes.common.data import DataError, Task
from recipes.new_task.settings import DEFAULTS

POINTS = [
    {"task2": 80.0, "drift": 1.0, "task1_worst": 97.0},
    {"task2": 85.0, "drift": 2.0, "task1_worst": 96.0},
    {"task2": 84.0, "drift": 3.0, "task1_worst": 98.0},
    {"task2": 70.0, "drift": 1.5, "task1_worst": 90.0},
]


def test_the_front_holds_the_points_that_no_other_beats_in_both_measures():
    assert trade_off.front(POINTS, "drift", least=True) == [POINTS[0], POINTS[1]]
    assert trade_off.front(POINTS, "task1_worst", least=False) == [POINTS[2], POINTS[1]]


def test_the_best_at_an_accuracy_is_among_those_that_reach_it():
    assert trade_off.reached(POINTS, 82.0, "drift", least=True) == 1
    assert trade_off.reached(POINTS, 82.0, "task1_worst", least=False) == 2
    assert trade_off.reached(POINTS, 90.0, "drift", least=True) is None


def test_a_setting_is_chosen_by_its_means_and_compared_seed_by_seed():
    def seed(path, other):
        at = {"time": 300, "task2": 85.0, "task1": 95.0, "seconds": 1.0}
        fip = [{"method": "fip", "drift": d, "task1_worst": 100 - d, **at} for d in path]
        return [*fip, {"method": "distillation", "drift": other, "task1_worst": 90.0, **at}]

    # The first setting of the path has the least drift of one seed, and the second the lower mean.
    runs = [seed((1.0, 3.0), 5.0), seed((8.0, 4.0), 8.0)]

    def last_row(runs):
        return " ".join(trade_off.table(runs).splitlines()[-1].split())

    assert last_row(runs) == (
        "300 steps ≥ 84 % 3.5 ± 0.707 6.5 ± 2.12 -3 ± 1 96.50 ± 0.71 90.00 ± 0.00 +6.50 ± 0.50"
    )
    assert last_row(runs[:1]) == "300 steps ≥ 84 % 1 5 99.00 90.00"


def test_both_methods_get_the_same_time_and_as_many_settings(monkeypatch, tmp_path):
    def task(name, offset):
        generator = torch.Generator().manual_seed(offset)
        inputs = torch.randn(80, 1, 28, 28, generator=generator)
        labels = offset + torch.arange(80) % 10
        return Task(name, 10, offset, inputs, labels, inputs[:20], labels[:20])

    assert len({len(rates) * len(weights) for rates, weights in trade_off.GRID.values()}) == 1
    assert {tuple(of) for of in trade_off.MOMENTUM.values()} == {trade_off.STEPS}
    grid = {"fip": ((0.3,), (30.0, 100.0)), "distillation": ((1e-3,), (0.01, 0.1))}
    momentum = {"fip": {2: 0.5, 4: 0.9}, "distillation": {2: 0.4, 4: 0.8}}
    monkeypatch.setattr(trade_off, "GRID", grid)
    monkeypatch.setattr(trade_off, "MOMENTUM", momentum)
    monkeypatch.setattr(trade_off, "STEPS", (2, 4))
    settings = replace(DEFAULTS["mnist"], anchors=10, anchor_batch=5, batch_size=10, task1_epochs=1)
    tasks = task("mnist", 0), task("fashion-mnist", 10)
    monkeypatch.setattr(trade_off, "TIMED_STEPS", 5)
    monkeypatch.setattr(trade_off, "TIMED_ROUNDS", 1)
    assert trade_off.step_ratio(tasks, settings, seed=0) > 0
    found = trade_off.points(tasks, settings, ratio=1.5, seed=0, progress=False)
    taken = {(p["method"], p["time"]): p["steps"] for p in found}
    assert taken == {
        ("fip", 2): 2,
        ("fip", 4): 4,
        ("distillation", 2): 3,
        ("distillation", 4): 6,
    }
    assert len(found) == 8
    assert [p["momentum"] for p in found] == [0.5, 0.5, 0.4, 0.4, 0.9, 0.9, 0.8, 0.8]
    assert len({p["drift"] for p in found}) == 8
    assert all(p["drift"] > 0 and p["task1_worst"] <= 100 for p in found)
    assert trade_off.means([found, found])[0]["drift"] == pytest.approx(found[0]["drift"])
    trade_off.draw(tmp_path / "curve.png", found)
    assert (tmp_path / "curve.png").stat().st_size > 0
    assert "distillation" in trade_off.table([found])


def test_an_interrupted_run_loses_only_the_unfinished_seed(monkeypatch, tmp_path):
    out = tmp_path / "trade_off.json"
    config = {"anchors": 5}
    done, interrupted = [], [2]

    def points(tasks, settings, *, ratio, seed, progress):
        if seed in interrupted:
            interrupted.clear()
            raise KeyboardInterrupt
        done.append(seed)
        return [{"method": "fip", "drift": seed * ratio}]

    # The ratio is timed once, so that distillation takes equally many steps with every seed.
    ratios = iter([1.5])
    monkeypatch.setattr(trade_off, "points", points)
    monkeypatch.setattr(trade_off, "step_ratio", lambda *args, **keywords: next(ratios))

    def run(seeds, *, resume, **other):
        keywords = {"config": config, "out": out, "resume": resume, "progress": False, **other}
        return trade_off.seed_by_seed(None, None, seeds, **keywords)

    with pytest.raises(KeyboardInterrupt):
        run([1, 2], resume=False)
    found = run([1, 2], resume=True)
    assert done == [1, 2]
    assert [seed[0]["drift"] for seed in found] == [1.5, 3.0]
    with pytest.raises(DataError, match=r"another configuration \(anchors 5 there, 6 asked for\)"):
        run([1, 2], resume=True, config={"anchors": 6})
