"""Inputs unlike those of the training: the images, and the measures against values computed by hand."""

import math
from dataclasses import replace

import pytest
import torch
from diversity_cases import INFO, SETTINGS
from torch import nn

from recipes.common.data import DataError
from recipes.diversity import beyond
from recipes.diversity.beyond import (
    calibration_error,
    changed_images,
    log_loss,
    outside_images,
    told_apart,
)
from recipes.diversity.objectives.far import Far
from recipes.diversity.source import EnsembleSource


def test_the_calibration_error_equals_one_counted_by_hand():
    # Sure by 0.9 twice and right once: 0.4 apart; sure by 0.6 twice and right twice: 0.4 apart.
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 0, 1])
    assert calibration_error(p, labels) == pytest.approx(40.0)
    assert calibration_error(torch.eye(2), torch.tensor([0, 1])) == 0.0
    # Both ends of the range have a bin.
    assert calibration_error(torch.zeros(1, 2), torch.tensor([1])) == pytest.approx(0.0)


def test_the_log_loss_equals_the_one_by_hand_and_stays_finite():
    p = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    expected = -(math.log(0.5) + math.log(0.8)) / 2
    assert log_loss(p, torch.tensor([0, 1])) == pytest.approx(expected, rel=1e-6)
    assert math.isfinite(log_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([1])))


def test_inputs_from_outside_are_told_apart_by_how_sure_predictions_are():
    inside, outside = torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([[0.7, 0.3]])
    assert told_apart(inside, outside) == 50.0  # one of the two pairs is in order
    assert told_apart(inside[:1], outside) == 100.0


def test_changed_images_stay_images_and_the_same_ones(images):
    x = images[0]
    found, again = changed_images(x, 3), changed_images(x, 3)
    assert list(found) == ["turned 15°", "turned 30°", "noise 0.1", "noise 0.2"]
    for name, changed in found.items():
        assert changed.shape == x.shape
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
        assert torch.equal(changed, again[name])
        assert not torch.equal(changed, x)
    spread = [float((found[f"noise {s:g}"] - x).square().mean()) for s in beyond.NOISE]
    assert spread[0] < spread[1]


def test_images_from_outside_are_the_same_pixels_in_another_order_without_other_data(
    task, tmp_path
):
    found = outside_images(task, tmp_path)
    assert found.name == "pixels in another order"
    own = INFO.pixels(task.test_inputs)
    assert found.images.shape == own.shape
    assert not torch.equal(found.images, own)
    sorted_pixels = [x.flatten(1).sort(dim=1).values for x in (found.images, own)]
    assert torch.equal(*sorted_pixels)


def test_images_from_outside_are_another_data_sets_if_it_is_there(task, tmp_path, monkeypatch):
    def loaded(name, *, data_root, download):
        if data_root != tmp_path:
            raise DataError("not there")
        assert (name, download) == ("mnist", False)
        return task

    monkeypatch.setattr(beyond, "load_task", loaded)
    fashion = replace(task, name="fashion-mnist")
    assert outside_images(fashion, tmp_path).name == "mnist"
    assert outside_images(fashion, tmp_path / "empty").name == "pixels in another order"


def test_the_distance_has_a_gradient_at_the_start_network_and_points_away(task):
    start, other = nn.Linear(4, 3), nn.Linear(4, 3)
    model = nn.Linear(4, 3)
    model.load_state_dict(start.state_dict())
    source = EnsembleSource(
        start=start,
        build=lambda: nn.Linear(4, 3),
        task=task,
        settings=SETTINGS,
        augment=None,
        distances=(),
        seed=0,
        progress=lambda steps, text: None,
    )
    loss = Far().loss(model, [], source, torch.Generator().manual_seed(0))
    loss().backward()
    assert sum(float(p.grad.square().sum()) for p in model.parameters()) == pytest.approx(1.0)
    # From two networks the gradient is the mean of the unit vectors toward them.
    model.zero_grad()
    model.load_state_dict({n: t + 10 for n, t in start.state_dict().items()})
    Far().loss(model, [other], source, torch.Generator().manual_seed(0))().backward()
    expected = []
    for network in (start, other):
        apart = [
            q.detach() - p.detach()
            for p, q in zip(model.parameters(), network.parameters(), strict=True)
        ]
        size = sum(float(a.square().sum()) for a in apart) ** 0.5
        expected.append([a / size for a in apart])
    for p, a, b in zip(model.parameters(), *expected, strict=True):
        torch.testing.assert_close(p.grad, (a + b) / 2, rtol=1e-3, atol=1e-3)
