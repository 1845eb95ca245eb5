"""Anchors refuse bad arguments, and the error names the argument."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Returns(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.layer, self.value = nn.Linear(4, 3), value

    def forward(self, x: Tensor) -> object:
        return self.value(self.layer(x))


X = torch.zeros(3, 4)


NAN = torch.full((3, 4), math.nan)


@pytest.mark.parametrize(
    ("build_it", "error", "message"),
    [
        (lambda: AnchorBatch("model", X), TypeError, "^model: must be a torch.nn.Module, got str"),
        (
            lambda: AnchorBatch(mlp(), [[1.0]]),
            TypeError,
            r"^inputs\[0\]: must be a tensor, got list",
        ),
        (lambda: AnchorBatch(mlp(), 3), TypeError, "^inputs: must be a tensor, a tuple"),
        (
            lambda: AnchorBatch(mlp(), X[:0]),
            ValueError,
            r"^inputs: got shape \(0, 4\), which holds no anchor",
        ),
        (lambda: AnchorBatch(mlp(), ()), ValueError, "^inputs: got an empty tuple"),
        (lambda: AnchorBatch(mlp(), (X, X[:2])), ValueError, r"same number of anchors .*3.*2"),
        (
            lambda: AnchorBatch(mlp(), {"input": X, "y": X[:2]}),
            ValueError,
            "same number of anchors",
        ),
        (
            lambda: AnchorBatch(mlp(), (X, torch.zeros(3))),
            TypeError,
            "^inputs: Sequential cannot be called with 2 positional inputs .* no labels",
        ),
        (
            lambda: AnchorBatch(mlp(), {"x": X}),
            TypeError,
            r"^inputs: Sequential cannot be called with the keywords \['x'\]",
        ),
        (lambda: AnchorBatch(mlp(), NAN), ValueError, "^inputs: holds NaN"),
        (
            lambda: AnchorBatch(mlp(), X, output="logit"),
            ValueError,
            "^output: got 'logit'; choose one of",
        ),
        (
            lambda: AnchorBatch(mlp(), X, output=3),
            TypeError,
            "^output: must be a name or a callable",
        ),
        (
            lambda: AnchorBatch(mlp(), X, batch_size=4),
            ValueError,
            "^batch_size: 4 is more than the 3",
        ),
        (
            lambda: AnchorBatch(mlp(), X, batch_size=0),
            ValueError,
            "^batch_size: must be a positive integer",
        ),
        (
            lambda: AnchorBatch(mlp(), X, chunk_size=-1),
            ValueError,
            "^chunk_size: must be a positive integer",
        ),
        (lambda: AnchorBatch(mlp(), X, augment=3), TypeError, "^augment: must be callable"),
        (
            lambda: AnchorBatch(Returns(lambda y: y.argmax(1)), X),
            TypeError,
            "^model: .*got a torch.int64",
        ),
        (
            lambda: AnchorBatch(Returns(lambda y: y.to(torch.complex64)), X),
            TypeError,
            "^model: .*complex64",
        ),
        (lambda: AnchorBatch(Returns(lambda y: [y]), X), TypeError, "^model: its output must be"),
        (
            lambda: AnchorBatch(Returns(lambda y: {"scores": y}), X),
            TypeError,
            "^model: .*'logits'; got dict",
        ),
        (
            lambda: AnchorBatch(Returns(lambda y: y.sum()), X),
            ValueError,
            "^model: .*one row per anchor",
        ),
        (
            lambda: AnchorBatch(Returns(lambda y: y[:1]), X),
            ValueError,
            "^model: .*one row per anchor",
        ),
        (
            lambda: AnchorBatch(Returns(lambda y: y / 0), X),
            ValueError,
            "^model: its outputs .*not finite",
        ),
        (lambda: AnchorBatch(mlp(), X).drift("max"), ValueError, "^reduction: choose"),
        (lambda: AnchorBatch(mlp(), X).extend((X,)), TypeError, "^inputs: the anchors held"),
        (lambda: AnchorBatch(mlp(), X).load_state_dict({"seed": 1}), ValueError, "^state: lacks"),
    ],
)
def test_bad_input_is_named(build_it: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_it()


def test_a_refresh_or_an_extension_that_fails_changes_nothing() -> None:
    model = mlp()
    anchors = AnchorBatch(model, torch.randn(5, 4), augment=torch.neg)
    before, weights = anchors.state_dict(), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    for fails in (anchors.refresh, lambda: anchors.extend(torch.randn(2, 4))):
        with pytest.raises(ValueError, match="not finite"):
            fails()
    model.load_state_dict(weights)
    assert len(anchors) == 5
    assert anchors.drift() == 0.0
    for key in ("inputs", "reference", "segments"):
        assert torch.equal(before[key], anchors.state_dict()[key])


def test_the_error_about_a_head_with_more_outputs_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    anchors = AnchorBatch(model, torch.randn(5, 4))
    old, model[1] = model[1], nn.Linear(6, 5)
    with torch.no_grad():
        model[1].weight[:3], model[1].bias[:3] = old.weight, old.bias
    start = copy.deepcopy(model.state_dict())
    message = "^model: gives 5 outputs an anchor now, the reference has 3"
    for fails in (
        FIPOptimizer(model[1].parameters(), anchors).step,
        lambda: AnchorMetric(anchors, model[1].parameters(), form="forward"),
        anchors.drift,
        anchors.predictions_kept,
        lambda: anchors.extend(torch.randn(2, 4)),
    ):
        with pytest.raises(ValueError, match=message):
            fails()
    # The message advises a refresh, or an output space of the first columns; both work.
    anchors.refresh()
    assert anchors.drift() == 0.0
    held = AnchorBatch(model, anchors.inputs, output=lambda z: z[:, :3])
    assert held.drift() == 0.0
    assert all(torch.equal(start[k], v) for k, v in model.state_dict().items())
