"""The attacks of ``recipes.diversity`` are as strong as they should be."""

import math

import pytest
import torch
import torch.nn.functional as F
from diversity_cases import INFO, SETTINGS
from torch import nn

from recipes.common.networks import digits_mlp
from recipes.diversity.attacks import Joint, Pixels, auto_attack, pgd
from recipes.diversity.training import train_network


def right(model, x, y):
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).double().mean())


def test_pixels_undo_the_normalisation(task, start, images):
    assert images[0].min() == 0
    assert images[0].max() == 1
    assert torch.allclose(Pixels(start, INFO)(images[0]), start(task.test_inputs[:100]), atol=1e-4)


def test_a_large_attack_brings_an_ordinary_network_to_almost_zero_accuracy(start, images):
    model = Pixels(start, INFO).eval()
    assert right(model, *images) > 95
    assert right(model, pgd(model, *images, 0.4), images[1]) <= 1


def test_a_large_attack_brings_an_ensemble_to_almost_zero_accuracy(task, start, images):
    other = train_network(digits_mlp, task, SETTINGS, augment=None, seed=7)
    joint = Joint([Pixels(start, INFO), Pixels(other, INFO)]).eval()
    assert right(joint, pgd(joint, *images, 0.4), images[1]) <= 1


def test_the_attacked_images_stay_in_the_ball_and_in_range(start, images):
    found = pgd(Pixels(start, INFO), *images, 0.1, steps=5)
    assert (found - images[0]).abs().max() <= 0.1 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize("attack", [pgd, lambda *a: auto_attack(*a, classes=10)])
def test_an_attack_of_size_zero_leaves_the_images_unchanged(start, images, attack):
    found = attack(Pixels(start, INFO), *images, 0.0)
    assert torch.equal(found, images[0])
    assert found is not images[0]


def test_restarts_never_lower_the_loss(start, images):
    model = Pixels(start, INFO).eval()

    def losses(restarts):
        found = pgd(model, *images, 0.1, steps=3, restarts=restarts)
        return F.cross_entropy(model(found), images[1], reduction="none")

    once, thrice = losses(1), losses(3)
    assert bool((thrice >= once - 1e-6).all())
    assert float(thrice.sum()) > float(once.sum())


def test_auto_attack_is_at_least_as_strong_as_pgd(start, images):
    model = Pixels(start, INFO).eval()
    x, y = images[0][:30], images[1][:30]
    weak = right(model, pgd(model, x, y, 0.1), y)
    assert right(model, auto_attack(model, x, y, 0.1, classes=10), y) <= weak + 1e-9


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_images_outside_the_range_are_refused(start, images, value):
    x = images[0].clone()
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"images: must be in \[0, 1\].*normalisation"):
        pgd(Pixels(start, INFO), x, images[1], 0.1)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"eps": -0.1}, "eps"), ({"eps": 8.0}, "eps"), ({"eps": 0.1, "steps": 0}, "steps")],
)
def test_a_setting_out_of_range_is_named(start, images, options, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        pgd(Pixels(start, INFO), *images, **options)


def test_the_model_is_left_in_its_mode(start, images):
    model = Pixels(start, INFO).train()
    pgd(model, *images, 0.1, steps=2, restarts=2)
    assert model.training
    model.eval()


def test_the_joint_output_is_the_logarithm_of_the_mean_probability(images):
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(3)]
    expected = torch.stack([m(images[0]).softmax(1) for m in members]).mean(0)
    assert torch.allclose(Joint(members)(images[0]).exp(), expected, atol=1e-6)
