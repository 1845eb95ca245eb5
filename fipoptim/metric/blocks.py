"""How anchors are laid out for the evaluations of a metric on a CPU: in blocks, and images channels-last."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fipoptim.anchors.inputs import Inputs, map_inputs
from fipoptim.metric.point import Point

# The most anchors in a block, so that its intermediate results stay in the cache. Blocks of feature maps are small.
# Others are larger, and grow with the number of weights, because each block reads them all and adds to all gradients.
CONVOLUTION_BLOCK, BLOCK, WEIGHTS_AN_ANCHOR = 128, 512, 50_000


def block_size(point: Point, count: int) -> int:
    """The number of anchors to linearize at a time if there are ``count`` whose outputs do not depend on each other."""
    if point.network.device.type != "cpu":
        return count
    size = sum(p.numel() for p in point.parameters.values())
    wide = max(BLOCK, size // WEIGHTS_AN_ANCHOR)
    most = CONVOLUTION_BLOCK if point.convolutional else wide
    return count if count <= most else math.ceil(count / math.ceil(count / most))  # equal blocks


def prefers_channels_last(point: Point) -> bool:
    """Whether the network has convolutions on a CPU, which are faster on images with their channels last."""
    return point.network.device.type == "cpu" and point.convolutional


def on_device(inputs: Inputs, device: torch.device, *, channels_last: bool) -> Inputs:
    """``inputs`` on ``device``, images ``(N, C, H, W)`` with their channels last if asked for."""

    def prepared(x: Tensor) -> Tensor:
        x = x.to(device, non_blocking=True)
        if channels_last and x.dim() == 4 and x.is_floating_point():
            # contiguous() sees no difference between the layouts of a single channel, but convolutions do.
            return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
        return x

    return map_inputs(prepared, inputs)
