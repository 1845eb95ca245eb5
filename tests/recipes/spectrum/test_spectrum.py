"""``recipes.spectrum`` from end to end on digits, and its parts against what they are made of."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fipoptim import AnchorMetric
from recipes.spectrum.command import main
from recipes.spectrum.measurements import MEASUREMENTS, register
from recipes.spectrum.measurements.layers import layers_of
from recipes.spectrum.measurements.moves import directions, flattest, reach
from recipes.spectrum.networks import NETWORKS
from recipes.spectrum.networks.minilm import MiniLM
from recipes.spectrum.networks.two_tasks import Digits
from recipes.spectrum.spectra import counted, density
from recipes.spectrum.start import NewTask, Start

SHORT = ["--no-progress", "--anchors", "8", "--leading", "3", "--top", "5", "--probes", "2"]
SHORT += ["--steps", "6", "--moves", "5", "--layer-steps", "4", "--path-steps", "4"]
SHORT += ["--path-networks", "2", "--path-products", "2"]


@pytest.fixture(scope="module")
def epoch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Digits, "epochs", 1)
        patch.setattr(Digits, "trace", False)  # a trace of each network takes longer than the rest
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, epoch):
    folder = tmp_path_factory.mktemp("spectrum")
    assert main([*SHORT, "--out", str(folder)]) == 0
    return folder, json.loads((folder / "results.json").read_text())


@pytest.fixture
def start():
    """A tiny network in float64, whose metric is known densely."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    inputs, new = torch.randn(5, 4).double(), torch.randn(7, 4).double()
    labels = torch.arange(7) % 3

    def loss(network):
        return F.cross_entropy(network(new), labels)

    task = NewTask("new", loss, lambda: iter([loss] * 100))
    networks = {"random": copy.deepcopy(model), "trained": model}
    return Start(
        networks,
        at="trained",
        inputs=inputs,
        output="logits",
        chunk_size=None,
        named=lambda m: dict(m.named_parameters()),
        new=task,
        top=4,
        trace=False,
    )


def settings_of(**values):
    from recipes.common.recipe_settings import option_kinds

    settings = Digits.settings.completed(option_kinds(MEASUREMENTS.values()))
    return settings.changed(anchors=5, leading=3, top=4, probes=2, steps=57, mu=(0.5,), **values)


def measured(name, start, **values):
    chosen, told = MEASUREMENTS[name], []
    settings = settings_of(**values)
    before = [p.clone() for p in start.network.parameters()]
    record = chosen.measure(start, settings, seed=0, progress=lambda n, text: told.append(n))
    assert all(map(torch.equal, before, start.network.parameters()))
    assert sum(told) == chosen.units(start, settings)
    return record


def test_a_run_measures_everything_and_leaves_a_figure(finished):
    folder, results = finished
    assert list(results["metrics"]) == list(MEASUREMENTS)
    assert (folder / "spectrum.png").read_bytes()[1:4] == b"PNG"
    (run,) = results["metrics"]["spectrum"]
    assert run["seed"] == 0
    assert set(run["networks"]) == {"random", "trained"}
    assert "nodes" not in run["networks"]["random"]
    points = results["metrics"]["path"][0]["points"]
    assert [p["step"] for p in points] == [0, 2, 4]
    assert points[0]["drift"] == 0 < points[-1]["drift"]
    assert points[0]["overlap"] == pytest.approx(1, abs=1e-4)


def test_a_resumed_run_measures_nothing_again(finished, capsys, monkeypatch):
    folder, results = finished
    for measurement in MEASUREMENTS.values():
        monkeypatch.setattr(type(measurement), "measure", None)
    assert main([*SHORT, "--resume", "--out", str(folder)]) == 0
    assert json.loads((folder / "results.json").read_text()) == results
    assert "how far the network may move" in capsys.readouterr().out


def test_what_is_missing_is_measured_at_the_network_that_is_there(finished):
    folder, results = finished
    (folder / "seed-0" / "overlap.json").unlink()
    assert main([*SHORT, "--resume", "--out", str(folder)]) == 0
    again = json.loads((folder / "results.json").read_text())["metrics"]["overlap"][0]
    assert again["shares"] == pytest.approx(results["metrics"]["overlap"][0]["shares"], rel=1e-4)


def test_the_spectrum_is_that_of_the_dense_matrix(start):
    record = measured("spectrum", start)["networks"]["trained"]
    dense = torch.linalg.eigvalsh(start.metric(start.network).dense()).flip(0)
    assert record["leading"] == pytest.approx(dense[:3].tolist(), rel=1e-3)
    assert record["size"] == len(dense) == 51
    assert record["outputs"] == 15
    nodes, numbers = counted(record)
    assert nodes[0] == pytest.approx(float(dense[0]), rel=1e-6)
    assert numbers[-1] == pytest.approx(15, rel=1e-6)  # the others are 0
    assert density(record).trace().value == pytest.approx(record["trace"])


def test_layers_are_measured_one_by_one(start):
    record = measured("layers", start, layer_probes=2, layer_steps=30)["networks"]["trained"]
    assert list(record) == ["0", "2"]
    matrix = start.metric(start.network).dense()[-21:, -21:]  # weight and bias of the last layer
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert record["2"]["largest"] == pytest.approx(largest, rel=1e-6)
    assert record["2"]["size"] == 21


def test_the_two_matrices_of_an_adapter_are_one_layer_and_vectors_are_none():
    p, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    named = {
        "a.q.lora_A.w": p,
        "a.q.lora_B.w": p,
        "a.norm.weight": bias,
        "b.weight": p,
        "b.bias": bias,
    }
    assert {k: len(v) for k, v in layers_of(named).items()} == {"a.q": 2, "b": 2}


def test_moves_are_predicted_and_measured(start):
    record = measured("moves", start, shortest=1e-5, longest=1.0, moves=6)
    g = start.metric_there.dense()
    values = torch.linalg.eigvalsh(g)
    found = record["directions"]
    assert found["leading eigenvector"]["sensitivity"] == pytest.approx(float(values[-1]), rel=1e-4)
    assert found["nearly null"]["sensitivity"] < 1e-6 * float(values[-1])
    first, t = found["random"], record["lengths"][0]
    assert first["measured"][0] == pytest.approx(first["sensitivity"] * t**2, rel=1e-3)
    assert len(found) == MEASUREMENTS["moves"].units(start, settings_of())
    assert all(v.norm() == pytest.approx(1.0) for v in directions(start, 5, 0).values())


def test_the_flattest_direction_of_a_whole_space_is_an_eigenvector_of_the_least_eigenvalue(start):
    metric = AnchorMetric(start.anchors(start.network))
    v = flattest(metric, torch.ones(metric.size).double(), 100)
    assert float(metric.matvec(v).norm()) < 1e-9


@pytest.mark.parametrize(
    ("drifts", "allowed", "expected"),
    [
        ([0.01, 1.0, 100.0], 4.0, 2.0),  # the square of the length
        ([0.01, 0.02, 0.03], 1.0, None),
        ([4.0, 5.0, 6.0], 1.0, 0.1),  # passed before the shortest move
    ],
)
def test_the_reach_is_where_the_drift_passes_what_is_allowed(drifts, allowed, expected):
    found = reach([0.1, 1.0, 10.0], drifts, allowed)
    assert found == (None if expected is None else pytest.approx(expected))


def test_the_share_of_the_gradient_is_that_of_the_dense_eigenvectors(start):
    record = measured("overlap", start)
    values, vectors = torch.linalg.eigh(start.metric_there.dense())
    b = start.gradient / start.gradient.norm()
    squares = (vectors.T @ b).square()
    expected = squares.flip(0).cumsum(0)[:4]
    assert record["shares"] == pytest.approx(expected.tolist(), abs=1e-3)
    beyond = float((squares * values / (values + 0.5)).sum())
    assert record["beyond"][0]["share"] == pytest.approx(beyond, rel=1e-6)
    assert 0 < record["beyond"][0]["random"] < 15 / 51


def test_a_path_moves_a_copy(start):
    points = measured("path", start, path_steps=2, path_networks=1, path_products=1)["points"]
    assert [p["step"] for p in points] == [0, 2]
    assert points[0]["drift"] == 0 < points[1]["drift"]
    assert points[0]["loss"] == pytest.approx(float(start.new.whole(start.network)))


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'moves' is registered already"):
        register("moves", MEASUREMENTS["layers"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--network", "resnet20"], "--checkpoint: resnet20 needs the file of a trained network"),
        (["--network", "resnet20", "--checkpoint", "no"], "--checkpoint: cannot be read"),
        (["--checkpoint", "no"], "--checkpoint: digits is trained here"),
        (["--anchors", "5000"], "--anchors: 5000 is more than the"),
        (["--mu", "0"], "--mu: 0 is out of range"),
        (["--network", "minilm-lora", "--texts", "no"], "--texts: no is no folder"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_every_network_has_settings_for_every_measurement():
    kinds = {kind for m in MEASUREMENTS.values() for kind in m.option_kinds}
    for network in NETWORKS.values():
        assert {type(options) for options in network.settings.method_options} <= kinds
        assert dataclasses.fields(network.settings)


def test_the_adapter_alone_is_looked_at():
    model = nn.Module()
    model.head = nn.Linear(2, 2)
    model.layer = nn.Module()
    model.layer.lora_A = nn.Linear(2, 2, bias=False)
    named = MiniLM.named(MiniLM.__new__(MiniLM), model)
    assert list(named) == ["layer.lora_A.weight"]
    assert math.prod(named["layer.lora_A.weight"].shape) == 4
