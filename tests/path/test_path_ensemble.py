"""Recorded networks as one module, against the sum of softmax outputs that defines it."""

import copy

import pytest
import torch
from torch import nn
from walks import Follower, TiedNet, assert_same, make

from fipoptim.path.ensemble import PathEnsemble
from fipoptim.path.record import FIPPath


def summed_softmax(states, indices, x):
    total = torch.zeros(len(x), 5)
    for i in indices:
        model = TiedNet().eval()
        model.load_state_dict(states[i])
        total += model(x).softmax(-1)
    return total


@pytest.mark.parametrize("indices", [None, [0, -1], [3], [2, 2, 5]])
def test_the_output_of_an_ensemble_is_the_summed_softmax(recorded, indices):
    model, path, states = recorded
    x = torch.randn(4, 5)
    members = path.ensemble(model, indices)
    chosen = range(7) if indices is None else indices
    assert len(members) == len(chosen)
    torch.testing.assert_close(members(x), summed_softmax(states, chosen, x))


def test_the_model_is_left_alone(recorded):
    model, path, _ = recorded
    model.train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    members = path.ensemble(model)
    x = torch.randn(4, 5)
    out = members(x)
    assert torch.equal(members.train()(x), out)  # members stay in eval mode
    assert members.training
    assert torch.equal(members.eval()(x), out)
    assert [m.training for m in model.modules()] == modes
    assert_same(model.state_dict(), before)
    assert all(p.requires_grad for n, p in model.named_parameters() if n != "frozen")


def test_gradients_reach_the_inputs(recorded):
    model, path, states = recorded
    x = torch.randn(4, 5, requires_grad=True)
    path.ensemble(model)(x)[:, 0].sum().backward()
    ours, x.grad = x.grad, None
    summed_softmax(states, range(7), x)[:, 0].sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_an_ensemble_can_be_moved_and_keeps_its_precision(recorded):
    model, path, states = recorded
    x = torch.randn(4, 5)
    members = path.ensemble(model)
    expected = summed_softmax(states, range(7), x)
    out = members.double()(x.double())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), expected)
    half = members.bfloat16()(x.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=0.05, rtol=0.05)


def test_logits_in_a_dict_and_another_class_dimension():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1)

        def forward(self, *, pixels):
            return {"logits": self.conv(pixels), "other": None}

    model = Model()
    with FIPPath(Follower(model)) as path:
        pass
    x = torch.randn(2, 1, 4, 4)
    out = path.ensemble(model, dim=1)(pixels=x)
    torch.testing.assert_close(out, model.conv(x).softmax(1))


def test_bad_members_of_an_ensemble_are_refused(recorded):
    model, path, _ = recorded
    with pytest.raises(ValueError, match="indices: is empty"):
        path.ensemble(model, [])
    with pytest.raises(IndexError, match="7 networks"):
        path.ensemble(model, [7])
    with pytest.raises(ValueError, match="model: is not of the architecture"):
        path.ensemble(TiedNet(width=7))


@pytest.mark.parametrize("indices", [3, 1.5, True])
def test_the_indices_of_an_ensemble_must_be_a_sequence(recorded, indices):
    model, path, _ = recorded
    with pytest.raises(TypeError, match=r"indices: must be several whole numbers"):
        path.ensemble(model, indices)


def test_a_bad_class_dimension_is_refused(recorded):
    model, path, _ = recorded
    for dim in (1.0, None, True, "1"):
        with pytest.raises(TypeError, match="dim: must be a whole number"):
            path.ensemble(model, dim=dim)
    with pytest.raises(IndexError, match=r"dim: .*\(2, 5\), have no dimension 2"):
        path.ensemble(model, dim=2)(torch.randn(2, 5))


def test_a_forward_that_writes_to_a_buffer_leaves_the_path_alone(folder):
    class Counting(TiedNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model, optimizer = make(net=Counting)
    with FIPPath(optimizer, folder=folder) as path:
        pass
    path.ensemble(model)(torch.randn(2, 5))
    assert float(path[0]["calls"]) == 0.0


def test_members_can_be_a_list_of_state_dictionaries(recorded):
    model, path, states = recorded
    x = torch.randn(4, 5)
    # The tied weight must be one object: state_dict() gives one view of it for each of its names.
    tied = [state | {"again.weight": state["embed.weight"]} for state in states]
    members = PathEnsemble(tied, model, [2, -1])
    assert members.indices == (2, 6)
    torch.testing.assert_close(members(x), path.ensemble(model, [2, -1])(x), rtol=0, atol=0)
