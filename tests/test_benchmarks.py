"""The benchmarks measure what they say, on the smallest case."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import budget, edge, language, pretrained, products, steps
from benchmarks.cases import CASES
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
