"""The networks that the recipes train."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipoptim.flat import matrix_shape
from fipoptim.geometry.muon import LONGEST_SIDE


def paper_cnn(classes: int = 20) -> nn.Sequential:
    """The two-task network of Raghavan et al. for inputs ``(n, 1, 28, 28)``.

    Two convolutions with batch norm (32 and 64 filters), three linear layers (600, 120, ``classes``): with 20
    classes the 1,476,548 parameters that the paper counts.
    """
    model = nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 6 * 6, 600),
        nn.ReLU(),
        nn.Linear(600, 120),
        nn.ReLU(),
        nn.Linear(120, classes),
    )
    return _initialise(model)


def digits_mlp(classes: int = 10) -> nn.Sequential:
    """A small network for inputs ``(n, 1, 8, 8)``: two hidden layers of 128 and 64 units."""
    return _fully_connected(64, 128, 64, classes)


def lenet_300_100(classes: int = 10) -> nn.Sequential:
    """The fully connected network of LeCun et al. for inputs ``(n, 1, 28, 28)``: 266,200 weights and 410 biases."""
    return _fully_connected(784, 300, 100, classes)


def vgg_small(classes: int = 10) -> nn.Sequential:
    """A small VGG for inputs ``(n, 3, 32, 32)``: three pairs of convolutions with batch norm (32, 64, 128 filters)."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in (32, 64, 128):
        for _ in range(2):
            layers += [
                nn.Conv2d(inputs, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(128 * 4 * 4, 256), nn.ReLU(), nn.Linear(256, classes)]
    return _initialise(nn.Sequential(*layers))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut; it is a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output ``(n, outputs, height / stride, width / stride)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for inputs ``(n, 3, 32, 32)``.

    Args:
        widths: Channels of each stage; every stage after the first halves the resolution.
        blocks: Blocks a stage.
        classes: Outputs.
        stride: The stride of the first convolution.
    """

    def __init__(self, widths: tuple[int, ...], blocks: int, classes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = [f"layer{i + 1}" for i in range(len(widths))]
        inputs = widths[0]
        for i, (name, width) in enumerate(zip(self.stages, widths, strict=True)):
            layers = []
            for j in range(blocks):
                layers.append(BasicBlock(inputs, width, stride=2 if i > 0 and j == 0 else 1))
                inputs = width
            self.add_module(name, nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, classes)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def resnet20(classes: int = 10) -> ResNet:
    """ResNet-20 of He et al. with 1x1 shortcuts: 272,474 parameters with 10 classes."""
    return ResNet((16, 32, 64), blocks=3, classes=classes)


def narrow_resnet18(classes: int = 100, stride: int = 1) -> ResNet:
    """The narrow ResNet-18 of Lopez-Paz and Ranzato (20 filters): 1,109,240 parameters with 100 classes.

    With a ``stride`` of 2 in the first convolution a step takes a third of the time.
    """
    return ResNet((20, 40, 80, 160), blocks=2, classes=classes, stride=stride)


def xavier(model: nn.Module) -> nn.Module:
    """Xavier initialisation (Glorot and Bengio, 2010) of all weights, in place; biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def network_for(family: str, classes: int) -> nn.Sequential:
    """The network for a family of ``DATASETS``. Channels are last: on a CPU a step takes a seventh less time."""
    model = {"digits": digits_mlp, "mnist": paper_cnn}[family](classes)
    return model.to(memory_format=torch.channels_last)


def path_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters of ``model`` in their order, as groups for ``FIPOptimizer``: wide layers are no matrices.

    Beyond ``LONGEST_SIDE`` Muon's geometry takes Newton-Schulz iterations. On a CPU the one such layer of ``paper_cnn``
    would make a step several times as long.
    """
    return [
        {"params": list(params), "matrix": False if wide else None}
        for wide, params in itertools.groupby(model.parameters(), _is_wide)
    ]


def _is_wide(p: Tensor) -> bool:
    return p.dim() > 1 and min(matrix_shape(p.shape)) > LONGEST_SIDE


def _fully_connected(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return _initialise(nn.Sequential(*layers[:-1]))


def _initialise(model: nn.Sequential) -> nn.Sequential:
    """He initialisation for layers before a ReLU; the head gets small weights, so that no class is preferred."""
    layers = [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    nn.init.normal_(layers[-1].weight, std=0.01)
    return model
