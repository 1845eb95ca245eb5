"""The benchmarks measure what they say, on the smallest case."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import budget, edge, geodesics, language, pretrained, products, spectrum, steps
from benchmarks.cases import CASES
from fipoptim import AnchorBatch, AnchorMetric
from recipes.common.data import load_pair
from recipes.common.networks import digits_mlp

CPU = torch.device("cpu")
SMALLEST = CASES[0]


@pytest.mark.parametrize("name", [steps.DEFAULT, steps.NAMES[4]])
def test_every_part_of_a_step_is_timed(name: str) -> None:
    loop = steps.Loop(name, *SMALLEST.make(0, CPU), bf16=False)
    seconds = steps.seconds_of_parts(loop, rounds=2)
    assert list(seconds) == list(steps.PARTS)
    whole = seconds.pop("step, all")
    with_products = name != steps.DEFAULT
    for part, duration in seconds.items():
        # At the benchmark's large beta the default takes no products, but it tries the step without them.
        taken = with_products or part not in ("minimise, tangents", "minimise, products")
        assert (duration > 0) == taken, part
        assert duration <= whole


def test_a_step_is_measured_beside_adam() -> None:
    found = steps.measure(SMALLEST, rounds=1, seed=0, device=CPU)
    assert list(found["rows"]) == list(found["peak_bytes"]) == list(steps.NAMES)
    assert found["rows"][steps.ADAM]["ratio"] == 1.0
    assert all(row["seconds"] > 0 for row in found["rows"].values())


def test_a_product_is_measured_beside_other_ways() -> None:
    found = products.measure(SMALLEST, rounds=1, seed=0, device=CPU, compiled=False)
    assert products.BASE in found["rows"]
    assert products.WAYS[0] in found["rows"]


def test_what_is_learnt_within_a_budget_is_measured_beside_a_sweep() -> None:
    case = dataclasses.replace(
        budget.CASES["digits"],
        budgets=(5.0,),
        steps=12,
        timed=4,
        strengths=(0.1,),
        rates=(1e-2,),
        lengths=(2.0,),
        within=5.0,
    )
    found = budget.measure(load_pair(*case.tasks), case, seed=0, lengths=True, progress=False)
    (ours,) = found["ours"]
    assert ours["within"]
    assert ours["check_drift"] <= 5.0
    assert len(found["sweep"]) == len(found["lengths"]) == 1
    assert budget.best_within(found["line"], 0.0) == found["line"][0]["new"]
    assert "eps 1.6, budget 5" in budget.table({"0": found})


def test_a_step_at_the_edge_of_a_budget_is_measured_beside_distillation() -> None:
    start = digits_mlp(10)
    with torch.no_grad():
        for p in start.parameters():
            p.mul_(3.0)  # so that steps move the outputs far
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = iter([(x[:20], torch.arange(20) % 10)] * 8)
    found = edge.measure(start, batches, x[:40], None)
    assert found["steps"] == 8
    assert found["at_the_edge"] > edge.FIRST
    assert found["ratio"] > 0
    assert found["drift"] <= edge.MAX_DRIFT


def test_the_memory_of_anchors_of_language_is_measured_by_store() -> None:
    torch.manual_seed(0)
    model = language.Language(200, 8)
    ids = torch.randint(200, (6, 10))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = {store: language.measure(model, texts, store, 1) for store in language.STORES}
    given = 2 * ids.nbytes
    weights = sum(p.nbytes for p in model.parameters())
    kept = {store: round(row["kept_mb"] * 1e6) for store, row in rows.items()}
    assert kept["full"] == given + 6 * 10 * 200 * 4
    assert kept["half"] == given + 6 * 10 * 200 * 2
    assert kept[32] == given + 6 * 10 * (32 + 33) * 4
    assert kept["live"] == given + weights
    assert rows["full"]["drift_of_rounding"] == rows["live"]["drift_of_rounding"] == 0
    assert 0 < rows["half"]["drift_of_rounding"] < 1e-6


class Encoder(nn.Module):
    """Has the interface of a text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(50, 6), nn.Linear(6, 6)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        hidden = torch.tanh(self.layer(self.table(input_ids)))
        return SimpleNamespace(last_hidden_state=hidden)


def test_steps_and_products_of_a_pretrained_network_are_measured() -> None:
    torch.manual_seed(0)

    def texts() -> dict[str, torch.Tensor]:
        mask = (torch.arange(8) < torch.tensor([[8], [5], [6]])).long()
        return {"input_ids": torch.randint(50, (3, 8)), "attention_mask": mask}

    model = pretrained.Embedding(Encoder())
    case = pretrained.Case(model, nn.Linear(6, 2), texts(), texts(), torch.tensor([0, 1, 0]))
    found = {
        "steps": pretrained.steps(case, rounds=1, title="tiny"),
        "products": pretrained.products(case, rounds=1, title="tiny"),
    }
    assert found["steps"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["steps"]["rows"][pretrained.PATH]["ratio"] > 0
    ways = (pretrained.TRACED, pretrained.RUN, pretrained.DIFFERENCE, pretrained.CURVLINOPS)
    assert set(found["products"]["rows"]) == {pretrained.PASSES, *ways}
    assert "curvlinops" in pretrained.table({"tiny": found})


def test_spectra_are_measured_beside_curvlinops_and_the_dense_matrix(monkeypatch) -> None:
    monkeypatch.setattr(spectrum, "EPOCHS", 1)
    found = spectrum.measure(seed=0, anchors=6, probes=2, steps=6, mu=1.0)
    best, rows = found["exact"], found["rows"]
    for name in ("fipoptim, spectrum", "curvlinops, scipy's eigsh"):
        assert rows[name]["leading"] == pytest.approx(best["leading"], rel=1e-3)
    for name in ("fipoptim, density", "curvlinops, fast_lanczos"):
        assert rows[name]["products"] == 12
        assert rows[name]["leading"][0] <= best["leading"][0] * (1 + 1e-4)
    assert rows["curvlinops, hutchpp_trace"]["products"] == 12
    table = spectrum.table(found)
    assert all(f"| {name} |" in table for name in rows)


def test_the_acceleration_takes_the_curvature_of_a_step_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double().eval()
    inputs = torch.randn(4, 3).double()
    metric = AnchorMetric(AnchorBatch(model, inputs))
    v = 0.1 * torch.randn(metric.size).double()
    a = geodesics.acceleration(metric, v, products=50, damping=1e-6, difference=1e-3)
    start = metric.outputs

    def off(t: float, acceleration: torch.Tensor) -> float:
        """The part of the outputs' change that is not linear in the step."""
        step = t * v + t**2 / 2 * acceleration
        return float((metric.outputs_after(step) - start - t * metric.jvp(v)).norm())

    for t in (1e-1, 1e-2):  # without it the rest is of second order, with it of third
        assert off(t, a) < t * off(t, torch.zeros_like(a))
    linear = AnchorMetric(AnchorBatch(nn.Linear(3, 2).double(), inputs))
    still = geodesics.acceleration(
        linear, torch.ones(8).double(), products=4, damping=0.01, difference=1.0
    )
    assert float(still.norm()) < 1e-10


def test_walks_are_equally_long_and_have_equally_many_products() -> None:
    setup = dataclasses.replace(
        geodesics.SETUPS["digits"], epochs=0.2, anchors=6, length=0.4, eps=(0.2,), budgets=(4,)
    )
    groups = list(geodesics.walks(setup))
    for plain, fewer, *corrected in groups:
        assert plain.products == 4
        for walk in corrected:
            assert walk.geodesic is not None
            assert walk.products == fewer.products
            assert walk.products + 1 + walk.geodesic == plain.products
    problem = geodesics.Problem(setup, load_pair(*setup.tasks), seed=0)
    first = [problem.run(walk) for walk in groups[0]]
    assert all(walk["length"] == pytest.approx(0.4, rel=1e-6) for walk in first)
    assert all(walk["drift"] > 0 for walk in first)
    again = problem.run(groups[0][0])  # whatever was walked before
    assert again["drift"] == pytest.approx(first[0]["drift"], rel=1e-9)
    last = problem.run(groups[-1][-1])
    assert last["drift"] > 0
    said = geodesics.table([first])
    assert f"{first[0]['drift']:.3g} | {first[1]['drift']:.3g}" in said
