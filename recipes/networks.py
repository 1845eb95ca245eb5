"""The networks that the recipes train."""

from __future__ import annotations

from torch import nn


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
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
    return _initialise(model)


def network_for(family: str, classes: int) -> nn.Sequential:
    """The network for a family of ``recipes.data.DATASETS``."""
    return {"digits": digits_mlp, "mnist": paper_cnn}[family](classes)


def _initialise(model: nn.Sequential) -> nn.Sequential:
    """He initialisation for the rectified layers; the head starts small, so all classes start alike."""
    layers = [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    nn.init.normal_(layers[-1].weight, std=0.01)
    return model
