"""Check inputs: what budgets count on, and no step sees."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, FIPOptimizer


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def inputs(count: int, seed: int) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def as_tuple(x: Tensor) -> tuple[Tensor, ...]:
    return (x,)


def as_dict(x: Tensor) -> dict[str, Tensor]:
    return {"input": x}


@pytest.mark.parametrize("form", [lambda x: x, as_tuple, as_dict])
def test_a_share_sets_inputs_aside_and_leaves_the_others_in_order(form: Any) -> None:
    x = inputs(20, 0)
    anchors = AnchorBatch(
        network(), form(x), check=0.25, generator=torch.Generator().manual_seed(3)
    )
    assert anchors.check is not None
    kept, aside = (
        next(iter(part.values())) if isinstance(part, dict) else torch.cat([*part])
        if isinstance(part, tuple) else part
        for part in (anchors.inputs, anchors.check.inputs)
    )  # fmt: skip
    assert (len(kept), len(aside)) == (15, 5)
    rows = [int((x == row).all(dim=1).nonzero()) for row in torch.cat([kept, aside])]
    assert sorted(rows) == list(range(20))
    assert rows[:15] == sorted(rows[:15])
    again = AnchorBatch(network(), form(x), check=0.25, generator=torch.Generator().manual_seed(3))
    assert anchors.fingerprint() == again.fingerprint()


def test_the_check_inputs_have_a_drift_of_their_own() -> None:
    model = network()
    old = copy.deepcopy(model)
    anchors = AnchorBatch(model, inputs(10, 0), check=inputs(7, 1), batch_size=2)
    assert anchors.counted is anchors.check
    assert AnchorBatch(model, inputs(10, 0)).counted.inputs.shape == (10, 4)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
        expected = (model(inputs(7, 1)) - old(inputs(7, 1))).square().sum(dim=1)
        kept = (model(inputs(7, 1)).argmax(1) == old(inputs(7, 1)).argmax(1)).double().mean()
    assert anchors.check is not None
    torch.testing.assert_close(anchors.check.drift("none"), expected)
    found = anchors.check.measure()
    assert found.drift == anchors.check.drift() != anchors.drift()
    assert found.flips == pytest.approx(1 - float(kept))
    assert "7 check inputs" in repr(anchors)


def test_no_step_depends_on_the_check_inputs() -> None:
    def moved(check: Tensor) -> list[Tensor]:
        model = network()
        anchors = AnchorBatch(
            model, inputs(10, 0), check=check, generator=torch.Generator().manual_seed(0)
        )
        optimizer = FIPOptimizer(model.parameters(), anchors, max_drift=1e6, eps=0.1)
        for k in range(3):
            optimizer.zero_grad()
            model(inputs(8, 5 + k)).square().sum().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for p, q in zip(moved(inputs(7, 1)), moved(inputs(9, 2)), strict=True):
        assert torch.equal(p, q)


def test_a_reference_network_is_that_of_the_check_inputs_too() -> None:
    model, old = network(0), network(1)
    anchors = AnchorBatch(model, inputs(10, 0), check=inputs(7, 1), reference=old)
    assert anchors.check is not None
    torch.testing.assert_close(anchors.check.reference, old(inputs(7, 1)).detach())
    outputs = old(inputs(10, 0)).detach()
    shared = AnchorBatch(model, inputs(10, 0), check=0.4, reference=outputs)
    assert shared.check is not None
    for part in (shared, shared.check):
        torch.testing.assert_close(part.reference, old(part.inputs).detach())


def test_refresh_and_extend_include_the_check_inputs() -> None:
    model = network()
    anchors = AnchorBatch(model, inputs(10, 0), check=inputs(7, 1))
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    anchors.extend(inputs(4, 2), check=0.5)
    assert anchors.check is not None
    assert (len(anchors), len(anchors.check)) == (12, 9)
    assert anchors.check.drift("none")[7:].max() < 1e-10 < float(anchors.check.drift("none")[0])
    anchors.extend(inputs(4, 3), check=inputs(2, 4))
    assert (len(anchors), len(anchors.check)) == (16, 11)
    anchors.refresh()
    assert anchors.drift() == anchors.check.drift() == 0.0


def test_the_state_holds_the_check_inputs() -> None:
    model = network()
    anchors = AnchorBatch(model, inputs(10, 0), check=inputs(7, 1), batch_size=3)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    other = AnchorBatch(model, inputs(5, 3), check=inputs(5, 4), batch_size=3)
    other.load_state_dict(anchors.state_dict())
    assert other.check is not None
    assert anchors.check is not None
    assert other.check.drift() == anchors.check.drift() > 0
    assert other.fingerprint() == anchors.fingerprint()
    for without, state in (
        (AnchorBatch(model, inputs(10, 0), batch_size=3), anchors.state_dict()),
        (other, AnchorBatch(model, inputs(10, 0), batch_size=3).state_dict()),
    ):
        before = without.fingerprint()
        with pytest.raises(ValueError, match="check was given for one of the two runs"):
            without.load_state_dict(state)
        assert without.fingerprint() == before


def test_another_check_is_another_reference() -> None:
    model = network()
    a = AnchorBatch(model, inputs(10, 0), check=inputs(7, 1))
    b = AnchorBatch(model, inputs(10, 0), check=inputs(7, 2))
    optimizer = FIPOptimizer(model.parameters(), a, max_drift=1.0)
    with pytest.raises(ValueError, match="other reference outputs"):
        FIPOptimizer(model.parameters(), b, max_drift=1.0).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"check": 0.0}, ValueError, r"^check: a share of the inputs must be in \(0, 1\), got 0.0"),
        ({"check": 1}, ValueError, r"^check: a share of the inputs must be in \(0, 1\), got 1"),
        ({"check": 0.01}, ValueError, r"^check: a share of 0.01 of 10 inputs is 0"),
        ({"check": True}, TypeError, r"^check: must be"),
        ({"check": "half"}, TypeError, r"^check: must be"),
        ({"check": (torch.zeros(3, 4),)}, TypeError, r"^check: the anchors held are"),
        (
            {"check": inputs(3, 1), "reference": torch.zeros(10, 3)},
            ValueError,
            r"^reference: outputs are of the anchors and say nothing of the check inputs",
        ),
        (
            {"check": 0.5, "reference": torch.zeros(5, 3)},
            ValueError,
            r"^reference: must have one row for each of the 10 inputs",
        ),
    ],
)
def test_bad_check_inputs_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AnchorBatch(network(), inputs(10, 0), **options)


def test_extend_asks_for_check_inputs_where_there_are_some() -> None:
    model = network()
    with pytest.raises(ValueError, match="^check: the anchors have check inputs; give"):
        AnchorBatch(model, inputs(10, 0), check=0.5).extend(inputs(4, 1))
    with pytest.raises(ValueError, match="^check: the anchors have no check inputs"):
        AnchorBatch(model, inputs(10, 0)).extend(inputs(4, 1), check=0.5)
