"""recipes.common.networks and recipes.common.training."""

import pytest
import torch
from recipe_helpers import blobs
from torch import nn

from recipes.common.data import DATASETS
from recipes.common.networks import digits_mlp, network_for, paper_cnn, path_groups
from recipes.common.training import (
    accuracy,
    adam_one_cycle,
    minibatches,
    scores,
    seed_everything,
    steps_in_epochs,
    train,
    training_mode,
)
from recipes.new_task.settings import DEFAULTS


def test_the_groups_of_a_path_leave_the_order_and_mark_the_one_wide_layer():
    model = paper_cnn()
    groups = path_groups(model)
    assert [p for g in groups for p in g["params"]] == list(model.parameters())
    wide = [g["params"] for g in groups if g["matrix"] is False]
    assert [[p.shape for p in params] for params in wide] == [[(600, 2304)]]


def test_paper_cnn_has_the_papers_parameters():
    model = paper_cnn()
    assert sum(p.numel() for p in model.parameters()) == 1_476_548
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 20)


def test_networks_fit_their_family():
    paired = [info for info in DATASETS.values() if info.family in DEFAULTS]
    assert len(paired) == 4
    for info in paired:
        side = {"digits": 8, "mnist": 28}[info.family]
        outputs = network_for(info.family, 2 * info.classes)(torch.randn(3, 1, side, side))
        assert outputs.shape == (3, 2 * info.classes)
        assert float(outputs.detach().abs().max()) < 2  # the head starts without a preference


def test_plain_training_learns():
    seed_everything(0)
    task, model = blobs(), digits_mlp(2)
    steps: list[int] = []
    optimizer, scheduler = adam_one_cycle(model, lr=1e-3, steps=40)
    batches = minibatches(task, batch_size=20, epochs=4, seed=0)
    seconds = train(model, batches, optimizer, scheduler, after_step=steps.append)
    assert steps == list(range(1, 41))
    assert seconds > 0
    assert accuracy(model, task.test_inputs, task.test_labels, batch_size=33) > 99


@pytest.mark.parametrize(
    ("momentum", "lowest", "highest"), [(None, 0.85, 0.95), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)]
)
def test_adams_first_beta_cycles_unless_it_is_given(momentum, lowest, highest):
    optimizer, scheduler = adam_one_cycle(digits_mlp(2), lr=1e-3, steps=20, momentum=momentum)
    found = []
    for _ in range(20):
        found.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        scheduler.step()
    assert (min(found), max(found)) == pytest.approx((lowest, highest), abs=1e-3)


def test_minibatches_are_full_and_repeatable():
    task = blobs(50)
    first, again = (list(minibatches(task, batch_size=20, epochs=3, seed=1)) for _ in range(2))
    assert [len(x) for x, _ in first] == [20] * 6
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert len(torch.cat([first[0][0], first[1][0]]).unique(dim=0)) == 40  # no input occurs twice
    assert [len(x) for x, _ in minibatches(task, batch_size=80, epochs=2, seed=1)] == [50, 50]


def test_the_last_epoch_may_be_a_part():
    task = blobs(50)
    whole, part = (list(minibatches(task, batch_size=10, epochs=e, seed=1)) for e in (3, 2.4))
    assert len(part) == steps_in_epochs(task, 10, 2.4) == 12
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole, part, strict=False))
    assert len(list(minibatches(task, batch_size=10, epochs=0.01, seed=1))) == 1


def test_frozen_batch_norm_keeps_its_statistics():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2))
    task = blobs()
    before = model[0].running_mean.clone()
    for frozen in (True, False):
        optimizer, scheduler = adam_one_cycle(model, lr=1e-3, steps=10)
        batches = minibatches(task, batch_size=20, epochs=1, seed=0)
        train(model, batches, optimizer, scheduler, freeze_batch_norm=frozen)
        assert torch.equal(model[0].running_mean, before) == frozen


def test_accuracy_can_be_limited_to_a_tasks_classes_and_scores_are_probabilities():
    model = nn.Identity()
    z = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0], [9.0, 0.0, 0.0, 1.0]])
    labels = torch.tensor([2, 3, 3])
    assert accuracy(model, z, labels) == pytest.approx(100 / 3)
    assert accuracy(model, z, labels, classes=(2, 4), batch_size=2) == pytest.approx(100)
    assert accuracy(model, z, labels, classes=(0, 3)) == pytest.approx(0)
    expected = z.double().exp() / z.double().exp().sum(dim=1, keepdim=True)
    found = scores(model, z, labels)
    assert torch.allclose(found.double(), expected[torch.arange(3), labels], atol=1e-6)


def test_accuracy_leaves_the_mode_alone():
    model, task = paper_cnn(), torch.randn(5, 1, 28, 28)
    training_mode(model, freeze_batch_norm=True)
    modes = [m.training for m in model.modules()]
    accuracy(model, task, torch.zeros(5, dtype=torch.long))
    assert [m.training for m in model.modules()] == modes
