"""Certificates: what they count, what they require, and what they refuse."""

from __future__ import annotations

import copy
import json
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fipoptim
from fipoptim import AnchorBatch, BudgetExceeded, certify


class Scores(nn.Module):
    """Gives scores by the input's number: a table of outputs."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, index: Tensor) -> Tensor:
        return self.table[index]


def networks(
    flipped: int, number: int = 400, classes: int = 3
) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, its reference, and inputs of which the first ones are predicted otherwise."""
    before = torch.eye(classes)[torch.arange(number) % classes]
    after = before.clone()
    after[:flipped] = before[:flipped].roll(1, dims=1)
    return Scores(after), Scores(before), torch.arange(number)


def test_it_counts_what_changed_and_bounds_it() -> None:
    model, reference, inputs = networks(flipped=6)
    certificate = certify(model, reference, inputs)
    assert (certificate.flips.count, certificate.flips.inputs) == (6, 400)
    assert certificate.flips.rate == 0.015
    assert certificate.flips.bound == pytest.approx(
        0.02941, abs=1e-4
    )  # Clopper and Pearson's table
    assert certificate.negative_flips is None
    assert certificate.drift.rate == pytest.approx(2 * 6 / 400)
    assert certificate.drift.rate < certificate.drift.bound < certificate.drift.high
    assert not certificate.groups


def test_the_reference_may_be_outputs() -> None:
    model, reference, inputs = networks(flipped=6)
    assert certify(model, reference(inputs), inputs) == certify(model, reference, inputs)


def test_a_network_beside_its_copy_is_unchanged() -> None:
    model = nn.Linear(4, 3)
    certificate = certify(model, copy.deepcopy(model), torch.randn(50, 4))
    assert certificate.flips.count == 0
    assert certificate.flips.bound == pytest.approx(1 - 0.05 ** (1 / 50))
    assert certificate.drift.bound == 0.0


def test_a_negative_flip_was_right_and_is_wrong() -> None:
    model, reference, inputs = networks(flipped=6)
    labels = reference(inputs).argmax(dim=1)
    labels[:2] = model(inputs).argmax(dim=1)[:2]  # wrong before, right now
    labels[2] = 3 - labels[2] - model(inputs).argmax(dim=1)[2]  # wrong before and now
    labels[3] = -100  # not known
    certificate = certify(model, reference, inputs, labels)
    assert certificate.negative_flips is not None
    assert certificate.negative_flips.count == 2
    assert certificate.negative_flips.inputs == 400


def test_an_input_with_several_predictions_counts_once() -> None:
    before = torch.eye(3)[torch.arange(20).reshape(5, 4) % 3]
    after = before.clone()
    after[1, :2] = before[1, :2].roll(1, dims=1)
    after[3, 3] = before[3, 3].roll(1)
    labels = before.argmax(dim=2)
    labels[3, 3] = -100
    certificate = certify(Scores(after), Scores(before), torch.arange(5), labels)
    assert certificate.flips.count == 2
    assert certificate.negative_flips is not None
    assert certificate.negative_flips.count == 1


def test_one_logit_predicts_by_its_sign() -> None:
    before = torch.linspace(-1, 1, 10).unsqueeze(1)
    certificate = certify(Scores(before + 0.5), Scores(before), torch.arange(10))
    assert certificate.flips.count == int(((before + 0.5 > 0) != (before > 0)).sum())


def test_groups_are_counted_apart_and_bounded_together() -> None:
    model, reference, inputs = networks(flipped=6)
    groups = ["first"] * 100 + ["rest"] * 300
    certificate = certify(model, reference, inputs, groups=groups)
    first, rest = certificate.groups["first"], certificate.groups["rest"]
    assert (first.inputs, first.flips.count, rest.inputs, rest.flips.count) == (100, 6, 300, 0)
    assert rest.flips.bound == pytest.approx(1 - 0.025 ** (1 / 300))  # each with 97.5 %
    assert certificate.flips == certify(model, reference, inputs).flips
    numbered = certify(model, reference, inputs, groups=torch.tensor([7] * 100 + [8] * 300))
    assert numbered.groups[7] == first


def test_it_prints_and_writes_everything() -> None:
    model, reference, inputs = networks(flipped=6)
    labels = reference(inputs).argmax(dim=1)
    certificate = certify(model, reference, inputs, labels, groups=["a", "b"] * 200)
    text = str(certificate)
    assert text.splitlines()[0] == "Certificate on 400 inputs, with 95 % confidence"
    assert "predictions changed                   400        6    1.5 %   2.94 %" in text
    assert "a: right before, wrong now" in text
    found = json.loads(certificate.to_json())
    assert found["confidence"] == 0.95
    assert found["overall"]["flips"] == {
        "count": 6,
        "inputs": 400,
        "rate": 0.015,
        "bound": certificate.flips.bound,
    }
    assert found["groups"]["b"]["negative_flips"]["count"] == 3
    alone = certify(model, reference, inputs[:1])
    assert json.loads(alone.to_json())["overall"]["drift"]["bound"] is None


# --- require -------------------------------------------------------------------------------------------


def test_what_is_within_the_budget_passes() -> None:
    model, reference, inputs = networks(flipped=6)
    labels = reference(inputs).argmax(dim=1)
    certify(model, reference, inputs, labels).require(
        max_flips=0.03, max_negative_flips=0.03, max_drift=0.2
    )


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_flips": 0.02}, "^max_flips: 6 of 400 predictions changed, at most 2.94 % with 95 %"),
        ({"max_negative_flips": 0.02}, "^max_negative_flips: 6 of 400 predictions were right"),
        ({"max_drift": 0.02}, "^max_drift: the mean drift is 0.03, at most 0.0"),
        ({"max_flips": 0.0}, "No number of inputs can certify a share of 0"),
        ({"max_flips": 0.001}, "too few: it takes at least 2995, even if nothing changes"),
    ],
)
def test_what_is_not_raises_with_the_reason(budget: dict[str, float], message: str) -> None:
    model, reference, inputs = networks(flipped=6)
    certificate = certify(model, reference, inputs, reference(inputs).argmax(dim=1))
    with pytest.raises(BudgetExceeded, match=message):
        certificate.require(**budget)


def test_a_single_group_beyond_the_budget_is_named() -> None:
    model, reference, inputs = networks(flipped=20)
    certificate = certify(model, reference, inputs, groups=["new"] * 40 + ["old"] * 360)
    with pytest.raises(BudgetExceeded, match="20 of 40 predictions changed in group 'new'.*97.5 %"):
        certificate.require(max_flips=0.2)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "^require: give at least one of max_flips, max_negative_flips, max_drift"),
        ({"max_flips": 1.0}, r"^max_flips: must be in \[0, 1\), got 1.0"),
        ({"max_flips": -0.1}, r"^max_flips: must be in \[0, 1\)"),
        ({"max_drift": math.nan}, "^max_drift: must be finite and >= 0"),
        ({"max_negative_flips": 0.1}, "^max_negative_flips: needs labels"),
    ],
)
def test_budgets_that_are_none(budget: dict[str, float], message: str) -> None:
    model, reference, inputs = networks(flipped=6)
    with pytest.raises(ValueError, match=message):
        certify(model, reference, inputs).require(**budget)


# --- evaluation ------------------------------------------------------------------------------------------


def test_it_is_the_function_in_eval_mode_and_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).train()
    reference = copy.deepcopy(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    inputs, state = torch.randn(30, 4), torch.get_rng_state()
    certificate = certify(model, reference, inputs, chunk_size=7)
    assert certificate.drift.rate == 0.0
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_outputs_are_compared_in_the_space_that_is_asked_for() -> None:
    model, reference, inputs = networks(flipped=6)
    logits = certify(model, reference, inputs).drift.rate
    probabilities = certify(model, reference, inputs, output="probabilities").drift.rate
    old = certify(model, reference, inputs, output=lambda z: z[:, :2])
    assert probabilities < logits
    assert old.flips.count < 6 or old.drift.rate < logits


def test_inputs_may_be_a_dictionary() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layer(x) * scale}

    model = Named()
    inputs = {"x": torch.randn(20, 4), "scale": torch.ones(20, 1)}
    assert certify(model, copy.deepcopy(model), inputs).flips.count == 0


# --- anchors -----------------------------------------------------------------------------------------------


def test_certifying_on_anchors_warns() -> None:
    model = nn.Linear(4, 3)
    inputs = torch.randn(50, 4)
    anchors = AnchorBatch(model, inputs[:20])
    with pytest.warns(UserWarning, match="^inputs: 20 of 50 are anchors of this model"):
        certify(model, copy.deepcopy(model), inputs)
    certify(model, copy.deepcopy(model), inputs[20:])  # these are not
    other = nn.Linear(4, 3)
    certify(other, copy.deepcopy(other), inputs)  # nor are they anchors of another model
    del anchors


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"confidence": 1.0}, ValueError, r"^confidence: must be in \(0, 1\), got 1.0"),
        ({"confidence": 95}, ValueError, "^confidence: must be in"),
        ({"chunk_size": 0}, ValueError, "^chunk_size: must be a positive integer, got 0"),
        ({"model": 3}, TypeError, "^model: must be a torch.nn.Module, got int"),
        (
            {"reference": [1.0]},
            TypeError,
            "^reference: must be a torch.nn.Module or a tensor of outputs, got list",
        ),
        (
            {"reference": torch.zeros(400, 4)},
            ValueError,
            r"^reference: has outputs of shape \(400, 4\)",
        ),
        ({"labels": torch.zeros(400)}, TypeError, "^labels: must be a tensor of whole numbers"),
        ({"labels": [0] * 400}, TypeError, "^labels: must be a tensor of whole numbers, got list"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"^labels: must have one entry for each"),
        ({"groups": ["a"]}, ValueError, "^groups: must name a group for each of 400 inputs, got 1"),
        ({"inputs": "text"}, TypeError, "^inputs: must be a tensor"),
        ({"reference": torch.full((400, 3), torch.nan)}, ValueError, "not finite"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model, reference, inputs = networks(flipped=6)
    arguments: dict[str, Any] = {"model": model, "reference": reference, "inputs": inputs} | change
    with pytest.raises(error, match=message):
        certify(**arguments)


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference, inputs = networks(flipped=6)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match="^scipy is needed to certify.*pip install scipy"):
        certify(model, reference, inputs)


def test_the_names_are_on_the_public_page() -> None:
    for name in ("certify", "Certificate", "BudgetExceeded", "inputs_needed"):
        assert name in fipoptim.__all__
