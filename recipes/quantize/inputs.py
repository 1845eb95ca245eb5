"""The inputs that a method quantizes with: training images without labels, and views of them."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.common.augment import augmentation
from recipes.common.data import Task
from recipes.quantize.settings import QuantizeSettings

_AT_ONCE = 50  # images that are shifted (and flipped) alike


def draw_images(task: Task, settings: QuantizeSettings, seed: int) -> Tensor:
    """The images of a seed, which are the same for every method: ``(anchors * views, channels, h, w)``.

    The first ``anchors`` are the images as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(task.train_inputs)
    drawn = torch.randperm(count, generator=generator)[: settings.anchors or count]
    images = task.train_inputs[drawn.to(task.train_inputs.device)]
    if settings.views > 1:
        augment = augmentation(task.name)
        torch.manual_seed(seed)
        views = [
            torch.cat([augment(part) for part in images.split(_AT_ONCE)])
            for _ in range(settings.views - 1)
        ]
        images = torch.cat([images, *views])
    # Convolutions are faster with the channels last.
    return images.contiguous(memory_format=torch.channels_last)
