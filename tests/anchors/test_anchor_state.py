"""The state of anchors: a resumed run goes on where it was, and a broken state is refused whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def shift(model: nn.Module, by: float = 0.1) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)


@pytest.mark.parametrize("augment", [None, torch.neg])
def test_anchors_that_load_a_state_continue_from_it(augment: object) -> None:
    model, x = mlp(), torch.randn(10, 4)
    anchors = AnchorBatch(
        model, x, batch_size=3, augment=augment, generator=torch.Generator().manual_seed(7)
    )
    shift(model)
    anchors.extend(torch.randn(4, 4))
    shift(model)
    other = AnchorBatch(model, torch.randn(2, 4), batch_size=2, augment=augment)
    other.load_state_dict(anchors.state_dict())
    other.batch_size = 3
    assert other.drift() == anchors.drift() > 0
    for step in range(3):
        for a, b in zip(anchors.sample(step), other.sample(step), strict=True):
            assert torch.equal(a, b)


def test_a_saved_state_does_not_follow_later_changes() -> None:
    model, x = mlp(), torch.randn(6, 4)
    anchors = AnchorBatch(model, x, augment=torch.neg, generator=torch.Generator().manual_seed(7))
    shift(model)
    anchors.extend(torch.randn(5, 4))
    shift(model)
    drift, sample = anchors.drift(), anchors.sample(3)
    state = anchors.state_dict()
    anchors.refresh()
    anchors.reference.add_(1)
    anchors.inputs.add_(1)
    anchors.load_state_dict(state)
    state["reference"].zero_()
    state["inputs"].zero_()
    assert anchors.drift() == drift
    for a, b in zip(sample, anchors.sample(3), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def nan(x: Tensor) -> Tensor:
    return torch.full_like(x, math.nan)


def changed(state: dict[str, object], name: str, value: object) -> dict[str, object]:
    return {**state, name: value(state[name]) if callable(value) else value}


def other_network(state: dict[str, object], change: object) -> dict[str, object]:
    parameters, buffers = state["references"][0]
    return {**state, "references": [(change(parameters), buffers)]}


BROKEN_STATES = {
    "not a mapping": (lambda s: [s], "must be what AnchorBatch.state_dict"),
    "more": (lambda s: {**s, "weights": 1}, "unknown entries"),
    "inputs of NaN": (lambda s: changed(s, "inputs", nan), "NaN"),
    "inputs are none": (lambda s: changed(s, "inputs", None), "'inputs'"),
    "inputs of another width": (
        lambda s: changed(s, "inputs", lambda x: x[:, :2]),
        "another model",
    ),
    "inputs of another type": (lambda s: changed(s, "inputs", lambda x: x.long()), "another model"),
    "fewer inputs": (lambda s: changed(s, "inputs", lambda x: x[:2]), "'reference' .* 2 anchors"),
    "fewer than a batch": (lambda s: changed(s, "inputs", lambda x: x[:1]), "batch_size=2"),
    "reference of NaN": (lambda s: changed(s, "reference", nan), "'reference' holds NaN"),
    "reference of fewer rows": (lambda s: changed(s, "reference", lambda x: x[:2]), "'reference'"),
    "reference of integers": (lambda s: changed(s, "reference", lambda x: x.long()), "'reference'"),
    "a wider reference": (lambda s: changed(s, "reference", lambda x: x.repeat(1, 2)), "6 outputs"),
    "a flat reference": (lambda s: changed(s, "reference", lambda x: x[:, 0]), "'reference'"),
    "no networks": (lambda s: changed(s, "references", []), "augment"),
    "networks are none": (lambda s: changed(s, "references", None), "'references' must be a list"),
    "network of one part": (lambda s: changed(s, "references", [({},)]), "pair"),
    "network of NaN": (
        lambda s: other_network(s, lambda w: {k: nan(t) for k, t in w.items()}),
        "'0.weight' of reference network 0 holds NaN",
    ),
    "another network": (
        lambda s: other_network(s, lambda w: {k: t[:1] for k, t in w.items()}),
        "not those of the model",
    ),
    "network of fewer layers": (
        lambda s: other_network(s, lambda w: dict(list(w.items())[1:])),
        "not those of the model",
    ),
    "segments of another count": (lambda s: changed(s, "segments", lambda x: x[:3]), "'segments'"),
    "a segment without network": (lambda s: changed(s, "segments", lambda x: x + 1), "'segments'"),
    "segments of floats": (lambda s: changed(s, "segments", lambda x: x.float()), "'segments'"),
    "seed is a text": (lambda s: changed(s, "seed", "7"), "'seed'"),
    "seed below zero": (lambda s: changed(s, "seed", -7), "'seed'"),
    "route is a text": (lambda s: changed(s, "route", "7"), "'route'"),
    "route of other values": (
        lambda s: changed(s, "route", lambda r: {**r, "stale": -1}),
        "'route'",
    ),
}


@pytest.mark.parametrize("name", sorted(BROKEN_STATES))
def test_a_broken_state_is_refused_whole(name: str) -> None:
    broken, message = BROKEN_STATES[name]
    model = mlp()
    anchors = AnchorBatch(model, torch.randn(5, 4), batch_size=2, augment=torch.neg)
    shift(model)
    before, sample = anchors.state_dict(), anchors.sample(1)
    with pytest.raises(ValueError, match=f"^state: .*{message}"):
        anchors.load_state_dict(broken(anchors.state_dict()))
    for a, b in zip(sample, anchors.sample(1), strict=True):
        assert torch.equal(a, b)
    after = anchors.state_dict()
    assert before["seed"] == after["seed"]
    for key in ("inputs", "reference", "segments"):
        assert torch.equal(before[key], after[key])
