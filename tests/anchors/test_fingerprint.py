"""The fingerprint of a reference tells it from others, and not from its own rounding."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fipoptim import AnchorBatch
from fipoptim.anchors.fingerprint import fingerprint_of, same_reference


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def test_a_fingerprint_is_of_the_reference_up_to_rounding() -> None:
    model = mlp()
    anchors = AnchorBatch(model, torch.randn(50, 4))
    first = anchors.fingerprint()
    assert first == anchors.fingerprint() == copy.deepcopy(anchors).fingerprint()
    assert same_reference(first, list(first))
    noisy = anchors.reference * (1 + 1e-7 * torch.randn_like(anchors.reference))
    assert same_reference(first, fingerprint_of(noisy))
    assert not same_reference(first, fingerprint_of(anchors.reference[:-1]))
    assert not same_reference(first, fingerprint_of(anchors.reference.flip(0)))
    assert not same_reference(first, fingerprint_of(anchors.reference.flip(1)))
    assert not same_reference(first, fingerprint_of(anchors.reference.reshape(25, -1)))
    for size in (1e-3, 1e-2, 1.0):
        moved = anchors.reference + size * torch.randn_like(anchors.reference)
        assert not same_reference(first, fingerprint_of(moved))
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    anchors.refresh()
    assert not same_reference(first, anchors.fingerprint())
