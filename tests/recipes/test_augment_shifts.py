"""Augmentation by shifts and flips."""

import torch

from recipes.common.augment import augmentation
from recipes.common.data import DATASETS


def test_shifts_fill_with_black_and_keep_the_shape():
    torch.manual_seed(0)
    for name in ("digits", "mnist", "cifar10"):
        black = DATASETS[name].black
        inputs = black + torch.zeros(2, len(black), 9, 7)
        for _ in range(5):
            torch.testing.assert_close(augmentation(name)(inputs), inputs)
        inputs = torch.randn_like(inputs)
        views = [augmentation(name)(inputs) for _ in range(20)]
        assert all(v.shape == inputs.shape for v in views)
        assert any(not torch.equal(v, inputs) for v in views)
