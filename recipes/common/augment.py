"""Random views of images: shifts and flips, or affine maps and mixtures of pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.common.data import DATASETS

Augment = Callable[[Tensor], Tensor]


def augmentation(name: str) -> Augment:
    """The usual augmentation of a data set: shifts within black borders, and flips for photographs.

    One view is drawn for a whole batch, by torch's default generator on the CPU.
    """
    info = DATASETS[name]
    pixels, flips = {"ten digits": (1, False), "mnist": (2, False), "cifar": (4, True)}[info.family]

    def augment(inputs: Tensor) -> Tensor:
        black = info.black.to(inputs)
        height, width = inputs.shape[2:]
        i, j = torch.randint(2 * pixels + 1, (2,)).tolist()
        # F.pad pads with one number for all channels, and black differs by channel: pad what is above black.
        padded = F.pad(inputs - black, (pixels,) * 4) + black
        view = padded[:, :, i : i + height, j : j + width]
        if flips and bool(torch.rand(()) < 0.5):
            view = view.flip(3)
        return view

    return augment


# The largest changes of an affine map.
TURN = 0.2  # radians
SHEAR = 0.15
SCALE = 0.15  # share of the size
SHIFT = 0.1  # share of half the image


def many(name: str, views: int) -> Augment:
    """Makes many views of few images, to compare two networks on them. Mixtures of images have no label.

    Each image is repeated ``views`` times. Each copy goes through an affine map of its own (turned, sheared, scaled,
    shifted, and flipped for photographs) and is then mixed with another copy, of which it takes half at most. All is
    drawn by torch's default generator on the CPU.

    Returns:
        A function of inputs ``(n, channels, h, w)`` that gives ``(n * views, channels, h, w)``.
    """
    info = DATASETS[name]
    flips = info.family == "cifar"

    def augment(inputs: Tensor) -> Tensor:
        black = info.black.to(inputs)
        # F.grid_sample fills the border with zeros: map what is above black.
        x = (inputs - black).repeat(views, 1, 1, 1)
        count = len(x)

        def draw(most: float) -> Tensor:
            return most * (2 * torch.rand(count) - 1)

        angle, shear, size = draw(TURN), draw(SHEAR), 1 + draw(SCALE)
        mirror = 1 - 2 * (torch.rand(count) < 0.5).float() if flips else torch.ones(count)
        cos, sin = angle.cos() * size, angle.sin() * size
        rows = [
            torch.stack([mirror * cos, shear - sin, draw(SHIFT)], dim=1),
            torch.stack([mirror * sin, cos, draw(SHIFT)], dim=1),
        ]
        grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid.to(x), align_corners=False)
        share = (0.5 + 0.5 * torch.rand(count, 1, 1, 1)).to(x)
        partner = torch.randperm(count).to(x.device)
        return share * x + (1 - share) * x[partner] + black

    return augment
