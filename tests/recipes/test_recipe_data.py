"""recipes.common.data and augmentation: data sets, pairs of tasks, and many views of an image."""

import numpy as np
import pytest
import torch

from recipes.common import augment, data
from recipes.common.augment import many
from recipes.common.data import DATASETS, DataError, load_pair, load_task


def test_two_tasks_share_one_head():
    low, high = load_pair("digits-low", "digits-high")
    assert low.train_labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert high.train_labels.unique().tolist() == [5, 6, 7, 8, 9]
    swapped_high, swapped_low = load_pair("digits-high", "digits-low")
    assert swapped_high.test_labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert swapped_low.test_labels.unique().tolist() == [5, 6, 7, 8, 9]
    assert torch.equal(swapped_low.test_inputs, low.test_inputs)


@pytest.mark.parametrize("name", ["digits-low", "digits-high"])
def test_digits_are_normalised_and_split_once(name):
    task = load_task(name)
    assert task.train_inputs.shape[1:] == (1, 8, 8)
    assert task.train_inputs.dtype == torch.float32
    assert abs(float(task.train_inputs.mean())) < 1e-3
    assert abs(float(task.train_inputs.std()) - 1) < 1e-3
    total = len(task.train_inputs) + len(task.test_inputs)
    assert len(task.test_inputs) / total == pytest.approx(0.25, abs=0.01)
    shares = task.test_labels.bincount() / len(task.test_labels)
    assert torch.allclose(shares, torch.full((5,), 0.2), atol=0.01)  # stratified
    assert torch.equal(task.test_inputs, load_task(name).test_inputs)


def test_torchvision_tasks_are_twenty_classes(image_root):
    mnist, fashion = load_pair("mnist", "fashion-mnist", data_root=image_root)
    assert mnist.train_inputs.shape == (40, 1, 28, 28)
    assert mnist.train_labels.unique().tolist() == list(range(10))
    assert fashion.test_labels.unique().tolist() == list(range(10, 20))
    white = float(DATASETS["mnist"].normalized(torch.ones(1, 1, 1, 1)))
    assert float(mnist.train_inputs.max()) == pytest.approx(white)


def test_colour_images_come_channels_first_and_normalised_by_channel(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)

    class Stored:
        base_folder = "cifar-10-batches-py"

        def __init__(self, root, *, train, download):
            self.data, self.targets = pixels, [0, 1, 2, 3, 4, 5]

    monkeypatch.setitem(data._TORCHVISION, "cifar10", Stored)
    task, info = load_task("cifar10"), DATASETS["cifar10"]
    assert task.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    for k in range(3):
        expected = (pixels[..., k] / 255 - info.mean[k]) / info.std[k]
        np.testing.assert_allclose(task.train_inputs[:, k].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_missing_data_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(DataError, match="--download") as error:
        load_task("mnist", data_root=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "MNIST" / "raw") in str(error.value)
    with pytest.raises(DataError, match="--download") as error:
        load_task("cifar10", data_root=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "cifar-10-batches-py") in str(error.value)


def test_unknown_and_incompatible_data_names_are_refused():
    with pytest.raises(DataError, match="digits-low, digits-high, mnist, fashion-mnist"):
        load_task("emnist")
    with pytest.raises(DataError, match="both 'mnist'"):
        load_pair("mnist", "mnist")
    with pytest.raises(DataError, match="beside 'digits-low' choose digits-high"):
        load_pair("digits-low", "fashion-mnist")


@pytest.mark.parametrize("name", ["digits-low", "mnist", "cifar10"])
def test_many_views_stay_images(name):
    info = DATASETS[name]
    shape = (5, len(info.mean), 28, 28)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    found = many(name, 4)(info.normalized(pixels))
    assert found.shape == (20, *shape[1:])
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (info.mean, info.std))
    back = found * std + mean
    assert float(back.min()) > -1e-5
    assert float(back.max()) < 1 + 1e-5
    assert len(found.flatten(1).unique(dim=0)) == 20
    torch.manual_seed(3)
    assert torch.equal(many(name, 4)(info.normalized(pixels)), found)


def test_without_an_affine_map_two_images_are_mixed(monkeypatch):
    for name in ("TURN", "SHEAR", "SCALE", "SHIFT"):
        monkeypatch.setattr(augment, name, 0.0)
    # The images differ in the position of their pixel.
    x = torch.eye(6).reshape(6, 1, 2, 3).repeat_interleave(2, dim=2)
    black = DATASETS["mnist"].black
    found = many("mnist", 1)(x + black) - black
    own = (found * x).sum(dim=(1, 2, 3)) / x.square().sum(dim=(1, 2, 3))
    assert bool((own >= 0.5 - 1e-5).all())
    assert torch.allclose(found.sum(dim=(1, 2, 3)), x.sum(dim=(1, 2, 3)), atol=1e-5)
