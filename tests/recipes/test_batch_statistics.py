"""Networks that move while batch norm uses the statistics of each batch, and get running statistics at the end."""

import pytest
import torch
from torch import nn

from recipes.common.batch_statistics import by_batch, with_statistics
from recipes.common.data import load_task
from recipes.common.training import accuracy
from recipes.diversity.ensembles import build_ensemble
from recipes.diversity.networks import NETWORKS
from recipes.diversity.training import train_network

SETTINGS = NETWORKS["digits-mlp"].settings.changed(
    members=2,
    straight_away=10,
    straight_between=2,
    away=40,
    between=20,
    epochs=5,
    batch_statistics=True,
)


def small():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


@pytest.fixture(scope="module")
def task():
    return load_task("digits")


@pytest.fixture(scope="module")
def start(task):
    return train_network(small, task, SETTINGS, augment=None, seed=0)


def test_the_copy_computes_in_eval_mode_what_the_network_computes_in_training(start, task):
    x = task.train_inputs[:64]
    before = {name: t.clone() for name, t in start.state_dict().items()}
    moving = by_batch(start)
    found = moving(x)
    assert not moving.training
    assert not torch.allclose(found, start(x), atol=1e-2)
    assert all(torch.equal(t, before[name]) for name, t in start.state_dict().items())
    assert torch.allclose(found, start.train()(x), atol=1e-5)
    start.load_state_dict(before)
    start.eval()


def test_the_statistics_are_means_over_batches_and_the_weights_are_the_moved_ones(start, task):
    before = {name: t.clone() for name, t in start.state_dict().items()}
    moving = by_batch(start)
    with torch.no_grad():
        for p in moving.parameters():
            p.mul_(1.1)
    batches = task.train_inputs[:300].split(100)
    made = with_statistics(moving, start, batches)
    features = [moving[0](x) for x in batches]
    mean = torch.stack([f.mean(dim=(0, 2, 3)) for f in features]).mean(dim=0)
    variance = torch.stack([f.var(dim=(0, 2, 3)) for f in features]).mean(dim=0)
    assert torch.allclose(made[1].running_mean, mean, atol=1e-5)
    assert torch.allclose(made[1].running_var, variance, rtol=1e-4)
    assert not made.training
    assert made[1].momentum == start[1].momentum
    for p, q in zip(made.parameters(), moving.parameters(), strict=True):
        assert torch.equal(p, q)
    assert all(torch.equal(t, before[name]) for name, t in start.state_dict().items())


def test_without_batch_norm_nothing_is_measured(task):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def batches():
        raise AssertionError("batches were read")
        yield

    made = with_statistics(by_batch(plain), plain, batches())
    assert torch.equal(made[1].weight, plain[1].weight)


@pytest.mark.parametrize("way", ["none", "withstand", "adversarial"])
def test_members_are_plain_networks_that_keep_the_function(way, start, task, tmp_path):
    ensemble = build_ensemble(
        way, start, small, task, SETTINGS, folder=tmp_path, augment=None, seed=0
    )
    clean = accuracy(start, task.train_inputs, task.train_labels)
    for member in ensemble:
        assert not torch.equal(member[0].weight, start[0].weight)
        assert not torch.equal(member[1].running_mean, start[1].running_mean)
        assert accuracy(member, task.train_inputs, task.train_labels) > clean - 2
