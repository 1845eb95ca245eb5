"""An objective that is written outside of the package: any callable that returns a loss is enough."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import batches_of, small_net
from torch import nn

from fipoptim import AnchorBatch, FIPOptimizer
from fipoptim.secondary import TaskLoss


class DecayToStart:
    """Squared distance between the weights of a network and those of the network that it started from."""

    def __init__(self, model, start):
        self.model = model
        self.start = [p.detach().clone() for p in start.parameters()]

    def __call__(self):
        pairs = zip(self.model.parameters(), self.start, strict=True)
        return sum((p - start).square().sum() for p, start in pairs)


def networks():
    """A start network, and a network that has moved away from it."""
    start = small_net().eval()
    model = copy.deepcopy(start)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return start, model


def test_a_callable_objective_pulls_the_weights_while_the_anchors_hold_the_function():
    start, model = networks()
    decay = DecayToStart(model, start)
    anchors = AnchorBatch(model, torch.randn(3, 4))
    optimizer = FIPOptimizer(model.parameters(), anchors, decay, beta=0.1, eps=0.02)
    before = float(decay())
    for _ in range(20):
        optimizer.step()
    moved_outputs = (start(anchors.inputs) - anchors.reference).square().sum(1).mean()
    assert float(decay()) < 0.5 * before
    assert anchors.drift() < 0.05 * float(moved_outputs)


def test_the_gradient_of_a_callable_objective_is_that_of_a_training_loop():
    start, model = networks()
    decay = DecayToStart(model, start)
    twin = copy.deepcopy(model)
    inputs = torch.randn(3, 4)
    ours = FIPOptimizer(model.parameters(), AnchorBatch(model, inputs), decay)
    theirs = FIPOptimizer(twin.parameters(), AnchorBatch(twin, inputs))
    for _ in range(3):
        ours.step()
        theirs.zero_grad()
        pairs = zip(twin.parameters(), start.parameters(), strict=True)
        sum((p - q.detach()).square().sum() for p, q in pairs).backward()
        theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_callable_objective_can_be_added_to_one_of_the_package():
    start, model = networks()
    batches = batches_of()
    task, decay = TaskLoss(model, batches), DecayToStart(model, start)
    anchors = AnchorBatch(model, torch.randn(3, 4))
    optimizer = FIPOptimizer(model.parameters(), anchors, lambda: task() + 0.1 * decay())
    x, y = batches[0]
    expected = F.cross_entropy(model(x), y) + 0.1 * decay()
    assert float(optimizer.step()) == pytest.approx(float(expected))


def test_a_plain_function_can_be_an_objective():
    model = nn.Linear(4, 3)
    anchors = AnchorBatch(model, torch.randn(2, 4))
    optimizer = FIPOptimizer(
        model.parameters(), anchors, lambda: model.weight.square().sum(), eps=0.05
    )
    before = float(model.weight.detach().norm())
    for _ in range(5):
        optimizer.step()
    assert float(model.weight.detach().norm()) < before
