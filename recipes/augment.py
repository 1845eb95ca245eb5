"""Images made many: random shifts and flips, one draw for a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.data import DATASETS

Augment = Callable[[Tensor], Tensor]


def augmentation(name: str) -> Augment:
    """The usual augmentation of a data set: shifts within black borders, and flips for photographs.

    The draws are torch's own on the CPU: one a batch, so that a batch is one view of its images.
    """
    info = DATASETS[name]
    pixels, flips = {"ten digits": (1, False), "mnist": (2, False), "cifar": (4, True)}[info.family]

    def augment(inputs: Tensor) -> Tensor:
        black = info.black.to(inputs)
        height, width = inputs.shape[2:]
        i, j = torch.randint(2 * pixels + 1, (2,)).tolist()
        # Padding is by a number: pad what is above black.
        padded = F.pad(inputs - black, (pixels,) * 4) + black
        view = padded[:, :, i : i + height, j : j + width]
        if flips and bool(torch.rand(()) < 0.5):
            view = view.flip(3)
        return view

    return augment
