"""Restoring a network that has changed: it lands at the budget, by a short way, or says that it does not."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipoptim import AnchorBatch, FIPOptimizer, restore
from fipoptim.anchors import Measured


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that knows a task, its inputs and labels."""
    torch.manual_seed(0)
    inputs = torch.randn(120, 6)
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))
    learn(model, inputs, labels, 150)
    return model, inputs, labels


def learn(model: nn.Module, inputs: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def changed(**options: Any) -> tuple[nn.Module, nn.Module, AnchorBatch]:
    """A network after training on something else, the network before, and anchors of the latter."""
    model, inputs, labels = trained()
    old = copy.deepcopy(model)
    torch.manual_seed(1)
    learn(model, torch.randn(40, 6) + 2, torch.randint(3, (40,)), 30)
    return model, old, AnchorBatch(model, inputs, reference=old, **options)


def test_the_reference_is_the_network_of_before() -> None:
    model, old, anchors = changed()
    with torch.no_grad():
        assert torch.equal(anchors.reference, old(anchors.inputs))
    assert anchors.drift() > 1
    with torch.no_grad():
        outputs = AnchorBatch(model, anchors.inputs, reference=old(anchors.inputs))
    assert outputs.fingerprint() == anchors.fingerprint()


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_it_lands_at_the_budget(share: float) -> None:
    model, _, anchors = changed()
    budget = share * anchors.drift()
    restored = restore(model, anchors, max_drift=budget)
    assert restored.within
    assert anchors.drift() == restored.after.drift <= budget
    assert restored.after.drift >= 0.5 * budget  # at the budget rather than far below
    assert restored.after.flips == pytest.approx(1 - anchors.predictions_kept())
    assert restored.products >= restored.steps >= 1


def test_a_wider_budget_takes_a_shorter_way() -> None:
    lengths = []
    for share in (0.01, 0.1, 0.5):
        model, _, anchors = changed()
        lengths.append(restore(model, anchors, max_drift=share * anchors.drift()).length)
    assert lengths[0] > lengths[1] > lengths[2] > 0


def test_its_way_is_shorter_than_interpolation_for_the_same_drift() -> None:
    model, old, anchors = changed()
    start = copy.deepcopy(model)
    budget = 0.1 * anchors.drift()
    restored = restore(model, anchors, max_drift=budget)
    distance = sum(
        float((p - q).detach().square().sum())
        for p, q in zip(old.parameters(), start.parameters(), strict=True)
    )
    for part in torch.linspace(0, 1, 101):  # the first point of the line that is within
        with torch.no_grad():
            for p, a, b in zip(
                model.parameters(), start.parameters(), old.parameters(), strict=True
            ):
                p.copy_(a + part * (b - a))
        if anchors.drift() <= budget:
            break
    assert restored.length < float(part) * math.sqrt(distance)


@pytest.mark.parametrize("flips", [0.0, 0.05])
def test_a_budget_of_flips_is_kept(flips: float) -> None:
    model, _, anchors = changed()
    assert 1 - anchors.predictions_kept() > 0.1
    restored = restore(model, anchors, max_flips=flips)
    assert restored.within
    assert anchors.predictions_kept() >= 1 - flips
    assert restored.after.flips == pytest.approx(1 - anchors.predictions_kept())


def test_a_budget_of_a_whole_number_of_flips_allows_that_number() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3), torch.randn(120, 4)
    outputs = model(inputs).detach()
    outputs[:6] = outputs[:6].roll(
        1, dims=1
    )  # 6 of 120 flips: 1 - 114 / 120 is above 0.05 in floating point
    anchors = AnchorBatch(model, inputs, reference=outputs)
    restored = restore(model, anchors, max_flips=0.05)
    assert (restored.within, restored.steps, restored.before.flips) == (True, 0, 0.05)


def test_both_budgets_are_kept() -> None:
    model, _, anchors = changed()
    budget = 0.2 * anchors.drift()
    assert restore(model, anchors, max_drift=budget, max_flips=0.02).within
    assert anchors.drift() <= budget
    assert anchors.predictions_kept() >= 0.98


def test_without_a_budget_it_goes_on_while_there_is_something_to_gain() -> None:
    model, _, anchors = changed()
    before = anchors.drift()
    restored = restore(model, anchors)
    assert restored.within
    assert anchors.drift() < 0.01 * before


def test_a_network_within_its_budget_is_left_alone() -> None:
    model, inputs, _ = trained()
    anchors = AnchorBatch(model, inputs)
    before = [p.detach().clone() for p in model.parameters()]
    restored = restore(model, anchors, max_drift=1.0, max_flips=0.01)
    assert (restored.within, restored.steps, restored.products, restored.length) == (
        True,
        0,
        0,
        0.0,
    )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert restore(model, anchors).steps == 0  # no drift: nothing to restore


def test_only_the_given_parameters_move() -> None:
    model, _, anchors = changed()
    first = [p.detach().clone() for p in model[0].parameters()]
    before = anchors.drift()
    restored = restore(model, anchors, max_drift=0.0, params=model[2].parameters(), max_products=8)
    assert not restored.within
    assert anchors.drift() < before
    assert restored.products <= 8
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), first, strict=True))


def test_a_budget_out_of_reach_leaves_the_nearest_network_and_says_so() -> None:
    model, _, anchors = changed()
    before = anchors.drift()
    restored = restore(model, anchors, max_drift=1e-12, max_products=4)
    assert not restored.within
    assert restored.products <= 4
    assert anchors.drift() == restored.after.drift < before
    assert "the budget was not reached" in str(restored)


def test_with_augment_other_views_are_restored_too() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)

    model, _, anchors = changed(augment=noisy)
    restored = restore(model, anchors, max_drift=0.1 * anchors.drift())
    assert restored.within


def test_a_network_that_cannot_move_the_outputs_stays() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(3))
            self.register_buffer("shift", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift + 0 * self.unused.sum()

    model = Fixed()
    anchors = AnchorBatch(model, torch.randn(4, 2))
    model.shift += 1
    restored = restore(model, anchors, max_drift=0.1)
    assert not restored.within
    assert restored.after == restored.before
    assert torch.equal(model.unused.detach(), torch.ones(3))


def test_an_error_on_the_way_puts_the_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, anchors = changed()
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    measure = AnchorBatch.measure

    def interrupted(self: AnchorBatch) -> Measured:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(self)

    monkeypatch.setattr(AnchorBatch, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        restore(model, anchors, max_drift=0.01)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_an_optimizer_goes_on_from_a_given_reference() -> None:
    model, _, anchors = changed()
    before = anchors.drift()
    optimizer = FIPOptimizer(model.parameters(), anchors, eps=0.1, beta=0.0)
    for _ in range(5):
        optimizer.step()
    assert anchors.drift() < before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_drift": -1.0}, ValueError, "^max_drift: must be finite and >= 0"),
        ({"max_flips": 1.0}, ValueError, r"^max_flips: must be in \[0, 1\)"),
        ({"max_flips": "few"}, TypeError, "^max_flips: must be a number"),
        ({"max_products": 0}, ValueError, "^max_products: must be a positive integer, got 0"),
        ({"anchors": 3}, TypeError, "^anchors: must be an AnchorBatch, got int"),
        ({"model": nn.Linear(2, 2)}, ValueError, "^model: is not the anchors' model"),
        ({"params": [torch.zeros(2)]}, ValueError, "^params: parameter 0"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model, _, anchors = changed()
    before = [p.detach().clone() for p in model.parameters()]
    arguments: dict[str, Any] = {"model": model, "anchors": anchors} | change
    with pytest.raises(error, match=message):
        restore(**arguments)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("reference", "options", "error", "message"),
    [
        (3, {}, TypeError, "^reference: must be a torch.nn.Module or a tensor of outputs, got int"),
        (torch.zeros(5, 3), {}, ValueError, r"^reference: must have one row for each of the 10"),
        (torch.zeros(10, 4), {}, ValueError, r"^reference: has outputs of shape \(10, 4\)"),
        (torch.full((10, 3), math.nan), {}, ValueError, "not finite"),
        (nn.Linear(6, 4), {}, ValueError, r"^reference: has outputs of shape \(10, 4\)"),
        (torch.zeros(10, 3), {"augment": torch.abs}, TypeError, "^reference: with augment it must"),
        (
            nn.Sequential(nn.Linear(6, 3)),
            {"augment": torch.abs},
            ValueError,
            "^reference: with augment it must be of the model's architecture, Linear",
        ),
    ],
)
def test_references_that_do_not_fit(
    reference: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AnchorBatch(nn.Linear(6, 3), torch.randn(10, 6), reference=reference, **options)


def test_outputs_that_are_not_finite_are_refused() -> None:
    model, _, anchors = changed()
    with torch.no_grad():
        model[2].weight[0, 0] = math.inf
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="not finite at today's weights"):
        restore(model, anchors, max_drift=0.1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_zeros_are_kept_if_that_is_asked_for() -> None:
    model, _, anchors = changed()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0.0
    before = anchors.drift()
    restored = restore(model, anchors, keep_zeros=True)
    assert bool((model[0].weight[:, ::2] == 0).all())
    assert restored.after.drift < 0.8 * before
    restore(model, anchors)
    assert bool((model[0].weight[:, ::2] != 0).any())
