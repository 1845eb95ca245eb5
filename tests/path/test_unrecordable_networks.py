"""Networks that differ from those recorded before: some are missed, and others are recorded all the same."""

import math

import pytest
import torch
from torch import nn
from walks import assert_holds, assert_same, euclidean, make, walk

from fipoptim.path.record import FIPPath


def miss_one_network(folder, match, change):
    """Changes the model for one step. That network must be missed, and the others recorded."""
    model, optimizer = make()
    with (
        pytest.raises(RuntimeError, match=rf"steps \[2\] could not be recorded.*{match}"),
        FIPPath(optimizer, folder=folder) as path,
    ):
        states = walk(model, optimizer, 1)
        undo = change(model)
        optimizer.step()
        undo()
        states += [{}, *walk(model, optimizer, 1)[1:]]
    assert path.steps == [0, 1, 3]
    for i, step in enumerate(path.steps):
        assert_same(path[i], states[step])
    assert math.isfinite(path.length())
    if folder is not None:
        assert_holds(folder, states, [0, 1, 3])


def test_a_network_with_another_shape_is_missed(folder):
    def change(model):
        weight, model.back.weight = model.back.weight, nn.Parameter(torch.zeros(5, 7))

        def undo():
            model.back.weight = weight

        return undo

    miss_one_network(folder, r"back\.weight was \(5, 6\) and is \(5, 7\)", change)


def test_a_network_whose_tied_weights_were_untied_is_missed(folder):
    def change(model):
        weight = model.again.weight
        model.again.weight = nn.Parameter(weight.detach().clone())

        def undo():
            model.again.weight = weight

        return undo

    miss_one_network(folder, r"again\.weight was tied to embed\.weight and is \(6, 5\)", change)


def test_a_network_that_lost_a_parameter_is_missed(folder):
    def change(model):
        frozen = model.frozen
        del model.frozen

        def undo():
            model.frozen = frozen

        return undo

    miss_one_network(folder, r"frozen was \(3,\) and is none any more", change)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_with_weights_that_became_infinite_or_nan_is_missed(folder, value):
    def change(model):
        model.frozen.data[0] = value

        def undo():
            model.frozen.data[0] = 1.0

        return undo

    miss_one_network(folder, "its weights are .* away from those of step 1", change)


def test_unchanged_infinite_entries_add_no_length(folder):
    model, optimizer = make()
    model.frozen.data.copy_(torch.tensor([-math.inf, math.nan, 1.0]))
    with FIPPath(optimizer, folder=folder) as path:
        states = walk(model, optimizer, 2)
    assert torch.equal(path[2]["frozen"][:1], torch.tensor([-math.inf]))
    for state in states:
        state["frozen"].zero_()
    expected = [euclidean(a, b, model) for a, b in zip(states, states[1:], strict=False)]
    assert path.length() == pytest.approx(sum(expected), rel=1e-6)
    assert bool(path.pca()[0].isfinite().all())


@pytest.mark.parametrize("drift", [math.nan, math.inf, torch.tensor(math.nan), None])
def test_a_drift_that_is_not_a_number_is_recorded_as_none(folder, drift):
    model, optimizer = make()
    optimizer.anchors.drift = lambda: drift
    with FIPPath(optimizer, folder=folder) as path:
        walk(model, optimizer, 1)
    assert path.drifts == [None, 0.5]
    if folder is not None:
        assert FIPPath.open(folder).drifts == [None, 0.5]


def test_buffers_may_change_their_shape(folder):
    model, optimizer = make()
    model.register_buffer("seen", torch.zeros(0))
    with FIPPath(optimizer, folder=folder) as path:
        walk(model, optimizer, 1)
        model.seen = torch.ones(3)
        walk(model, optimizer, 1)
    assert [len(state["seen"]) for state in path] == [0, 0, 3]
    with pytest.raises(ValueError, match=r"seen is \(3,\) in the model and \(0,\)"):
        path.load_into(model, 0)
    members = path.ensemble(model, [2, 0])
    with pytest.raises(ValueError, match=r"seen is \(3,\) in the model and \(0,\)"):
        members(torch.randn(2, 5))
