"""The loss of a new task against that of a training loop, and the order of its batches."""

import copy
import pickle
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from small_networks import batches_of, small_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fipoptim.secondary import TaskLoss


def test_the_batches_are_taken_in_turn_and_start_again():
    model, batches = small_net().eval(), batches_of()
    task = TaskLoss(model, batches)
    expected = [F.cross_entropy(model(x), y) for x, y in batches] * 2
    torch.testing.assert_close([task() for _ in range(6)], expected)


def test_gradient_is_the_training_loops():
    model, batches = small_net(), batches_of()
    grads = torch.autograd.grad(TaskLoss(model, batches)(), list(model.parameters()))
    model.zero_grad()
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    torch.testing.assert_close(list(grads), [p.grad for p in model.parameters()])


def test_a_dataloader_shuffles_anew_each_pass():
    x = torch.arange(64.0).reshape(64, 1)
    seen = []
    loader = DataLoader(
        TensorDataset(x, x), batch_size=16, shuffle=True, generator=torch.Generator()
    )

    def remember(out, y):
        seen.append(y.flatten())
        return out.mean()

    task = TaskLoss(nn.Linear(1, 1), loader, remember)
    for _ in range(8):
        task()
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


def test_several_inputs_and_logits_in_a_dict():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a, b):
            return {"logits": self.layer(a + b)}

    model = Model()
    a, b, y = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    expected = F.cross_entropy(model.layer(a + b), y)
    for x in [(a, b), [a, b], {"b": b, "a": a}]:
        torch.testing.assert_close(TaskLoss(model, [(x, y)])(), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("used", [1, 3])
def test_a_copy_goes_on_with_the_batch_that_was_next(duplicate, used):
    model = small_net().eval()
    x, y = torch.randn(10, 4), torch.randint(3, (10,))
    task = TaskLoss(model, DataLoader(TensorDataset(x, y), batch_size=4))
    for _ in range(used):
        task()
    twin = duplicate(task)
    torch.testing.assert_close([twin() for _ in range(4)], [task() for _ in range(4)])


def test_bad_loaders():
    model = small_net()
    with pytest.raises(ValueError, match="loader: yields no batch"):
        TaskLoss(model, [])()
    used_up = TaskLoss(model.eval(), (b for b in batches_of(4)))
    used_up()
    with pytest.raises(ValueError, match="used up only once"):
        used_up()
    with pytest.raises(TypeError, match=r"loader: must yield \(x, y\) pairs, got a Tensor"):
        TaskLoss(model, [torch.ones(2, 4)])()
    with pytest.raises(TypeError, match="tuple of length 3"):
        TaskLoss(model, [(torch.ones(2, 4), torch.ones(2), torch.ones(2))])()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("used", [0, 1, 3, 4])
def test_a_copy_shuffles_as_the_original_does(duplicate, own_generator, used):
    """The original and the copy continue from the same random state, as in a resumed run."""
    torch.manual_seed(5)
    model = small_net().eval()
    x, y = torch.randn(10, 4), torch.randint(3, (10,))
    generator = torch.Generator().manual_seed(3) if own_generator else None
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True, generator=generator)
    task = TaskLoss(model, loader)
    for _ in range(used):
        task()
    twin = duplicate(task)
    state = torch.get_rng_state()

    def go_on(loss):
        torch.set_rng_state(state)
        losses = []
        for _ in range(9):  # the rest of this pass, and two more
            losses.append(float(loss()))
            # Random numbers that training draws besides the loader.
            losses.append(float(torch.rand(())))
        return losses

    assert go_on(task) == go_on(twin)


def test_a_copy_of_an_iterator_goes_on():
    model, batches = small_net().eval(), batches_of(16)
    task = TaskLoss(model, iter(batches))
    task()
    twin = copy.deepcopy(task)
    expected = [F.cross_entropy(model(x), y) for x, y in batches[1:]]
    torch.testing.assert_close([twin() for _ in range(3)], expected)


def test_batches_are_moved_whatever_they_are_made_of():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a, scale=1.0, mask=None):
            assert mask is None
            return self.layer(a) * scale

    model, a, y = Model(), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    expected = F.cross_entropy(2 * model.layer(a), y)
    for x in [
        (a, 2.0),
        [a, 2.0, None],
        UserDict(a=a, scale=2.0),
        {"a": a, "scale": 2.0, "mask": None},
    ]:
        torch.testing.assert_close(TaskLoss(model, [(x, y)])(), expected)
    loss = TaskLoss(
        model,
        [(a, {"label": y, "names": ["u", "v"]})],
        lambda z, y: F.cross_entropy(2 * z, y["label"]),
    )
    torch.testing.assert_close(loss(), expected)


def test_arguments_of_the_wrong_type():
    model, batches = small_net(), batches_of()
    for loader in (None, 3, nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="loader: must be a DataLoader or another iterable"):
            TaskLoss(model, loader)
    with pytest.raises(TypeError, match=r"model: must be a torch\.nn\.Module, got OrderedDict"):
        TaskLoss(model.state_dict(), batches)
    with pytest.raises(TypeError, match="loss_fn: must be a function .*, got str"):
        TaskLoss(model, batches, "cross_entropy")


def test_loss_must_be_a_scalar():
    with pytest.raises(ValueError, match=r"loss_fn: must return a scalar tensor, .*\(4,\)"):
        TaskLoss(small_net(), batches_of(), lambda z, y: F.cross_entropy(z, y, reduction="none"))()
