"""The networks and batches on which objectives are checked."""

import torch
from torch import nn


def small_net(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)
    )


def batches_of(n=10, size=4, seed=0):
    torch.manual_seed(seed)
    x, y = torch.randn(n, 4), torch.randint(3, (n,))
    return [(x[i : i + size], y[i : i + size]) for i in range(0, n, size)]


def two_layers(values):
    """Linear layers of 2x3 and 3x2 weights with the given values, and biases that are not zero."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    flat = torch.tensor(values)
    with torch.no_grad():
        model[0].weight.copy_(flat[:6].view(2, 3))
        model[1].weight.copy_(flat[6:].view(3, 2))
    return model


def flat_weights(model):
    return torch.cat([model[0].weight.flatten(), model[1].weight.flatten()]).detach().double()
