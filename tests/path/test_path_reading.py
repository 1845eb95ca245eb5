"""Recorded networks: reading them by index, loading them into models, and the summary of a path."""

import copy

import pytest
import torch
from torch import nn
from walks import TiedNet, assert_same, make, walk

from fipoptim.path.record import FIPPath


def test_indexing(recorded):
    _, path, states = recorded
    assert_same(path[-2], states[-2])
    for i in (7, -8):
        with pytest.raises(IndexError, match="7 networks"):
            path[i]
    with pytest.raises(TypeError, match="one whole number"):
        path[1:3]


def test_a_state_that_was_read_belongs_to_the_caller(recorded):
    _, path, states = recorded
    path[2]["scale"].zero_()
    assert_same(path[2], states[2])


def test_load_state_dict_takes_a_state(recorded):
    _, path, states = recorded
    model = TiedNet()
    model.load_state_dict(path[3], strict=True)
    assert_same(model.state_dict(), states[3])


def test_load_into(recorded):
    _, path, states = recorded
    model = TiedNet().double()
    weight = model.embed.weight
    path.load_into(model, -3)
    assert model.embed.weight is weight is model.again.weight
    assert model.scale.dtype == torch.float64
    assert_same(model.float().state_dict(), states[-3])


def test_load_into_changes_nothing_where_it_does_not_fit(recorded):
    _, path, _ = recorded
    model = TiedNet(width=7)
    model.more = nn.Linear(2, 2)
    del model.scale
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        path.load_into(model, 0)
    for part in (
        "more.weight is not in the path",
        "scale is not in the model",
        "embed.weight is (7, 5) in the model and (6, 5) in the path",
    ):
        assert part in str(error.value)
    assert_same(model.state_dict(), before)


def test_untied_networks_do_not_fit_a_tied_model():
    model, optimizer = make()
    model.again.weight = nn.Parameter(torch.zeros(6, 5))
    with FIPPath(optimizer) as path:
        pass
    with pytest.raises(ValueError, match=r"embed\.weight and again\.weight are one tensor"):
        path.load_into(TiedNet(), 0)


def test_repr(recorded):
    _, path, _ = recorded
    assert repr(path).startswith("FIPPath(7 networks in ")


def test_whole_numbers_of_other_libraries(tmp_path):
    import numpy as np

    model, optimizer = make()
    with FIPPath(optimizer, every=np.int64(2), folder=tmp_path) as path:
        states = walk(model, optimizer, 4)
    assert FIPPath.open(tmp_path).every == 2
    assert_same(path[np.int32(-1)], states[4])
    assert_same(path[torch.tensor(1)], states[2])
    assert path.ensemble(model, np.array([0, -1])).indices == (0, 2)
    assert path.ensemble(model, torch.tensor([1])).indices == (1,)
    torch.testing.assert_close(path.pca(np.int64(1))[0], path.pca(1)[0], rtol=0, atol=0)


@pytest.mark.parametrize("i", [True, 1.0, "1", None, torch.tensor(1.0), torch.tensor(True)])
def test_an_index_must_be_a_whole_number(recorded, i):
    model, path, _ = recorded
    takes = (
        path.__getitem__,
        lambda i: path.load_into(model, i),
        lambda i: path.ensemble(model, [i]),
    )
    for take in takes:
        with pytest.raises(TypeError, match="index: must be one whole number"):
            take(i)


@pytest.mark.parametrize("model", [None, {}, [nn.Linear(1, 1)], TiedNet])
def test_a_model_must_be_a_module(recorded, model):
    _, path, _ = recorded
    for take in (lambda: path.load_into(model, 0), lambda: path.ensemble(model)):
        with pytest.raises(TypeError, match="model: must be a torch.nn.Module"):
            take()


@pytest.mark.parametrize(
    "scale", [torch.ones((), device="meta"), torch.ones((), dtype=torch.complex64)]
)
def test_models_that_cannot_hold_the_values(recorded, scale):
    _, path, _ = recorded
    model = TiedNet()
    model.scale = nn.Parameter(scale)
    for take in (lambda: path.load_into(model, 0), lambda: path.ensemble(model)):
        with pytest.raises(ValueError, match=r"scale is (on the meta device|torch\.complex64)"):
            take()


def test_weights_are_not_cast_to_whole_numbers(recorded):
    _, path, _ = recorded
    model = TiedNet()
    model.frozen = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"frozen is torch\.int8 in the model and torch\.float32"):
        path.load_into(model, 0)
    assert_same(model.state_dict(), before)


def test_networks_of_several_dtypes(folder):
    model, optimizer = make()
    with FIPPath(optimizer, folder=folder) as path:
        walk(model, optimizer, 1)
        model.double()
        optimizer.step()
        model.bfloat16()
        optimizer.step()
    assert [state["scale"].dtype for state in path] == [
        torch.float32, torch.float32, torch.float64, torch.bfloat16,
    ]  # fmt: skip
    x = torch.randn(3, 5)
    expected = torch.zeros(3, 5)
    for state in path:
        member = TiedNet().eval()
        member.load_state_dict(state)
        expected += member(x).softmax(-1)
    torch.testing.assert_close(path.ensemble(TiedNet())(x), expected)
    assert bool(path.pca()[0].isfinite().all())
