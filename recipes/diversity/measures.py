"""Measures of the networks of an ensemble: their accuracy together, and how they differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.diversity.attacks import AT_ONCE


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """The softmax outputs ``(n, classes)``."""
    return torch.cat([model(x).softmax(dim=1) for x in images.split(AT_ONCE)])


@dataclass
class Votes:
    """The predictions of all members on one set of images; they are added one at a time, so one is in memory.

    Attributes:
        labels: The labels of the images, ``(n,)``.
        accuracies: The accuracy of each member, in percent.
        predictions: The predicted classes of each member, ``(n,)``.
        total: The sum of the members' probabilities, ``(n, classes)``; None before the first.
    """

    labels: Tensor
    accuracies: list[float] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    total: Tensor | None = None

    def add(self, p: Tensor) -> None:
        """Adds a member with its probabilities ``(n, classes)``."""
        self.predictions.append(p.argmax(dim=1))
        self.accuracies.append(percent(self.predictions[-1] == self.labels))
        self.total = p.clone() if self.total is None else self.total + p

    @property
    def probabilities(self) -> Tensor:
        """The mean of the members' probabilities, ``(n, classes)``."""
        assert self.total is not None
        return self.total / len(self.predictions)

    @property
    def joint(self) -> float:
        """The accuracy of the mean of the members' probabilities, in percent."""
        return percent(self.probabilities.argmax(dim=1) == self.labels)

    @property
    def mean(self) -> float:
        """The mean accuracy of the members, in percent."""
        return sum(self.accuracies) / len(self.accuracies)

    def record(self) -> dict[str, float | Sequence[float]]:
        """The accuracies: joint, mean, and of each member."""
        return {"joint": self.joint, "mean": self.mean, "members": self.accuracies}

    @property
    def disagreement(self) -> float:
        """The share of images that two members classify differently, in percent; the mean over all pairs."""
        pairs = [
            percent(a != b)
            for k, a in enumerate(self.predictions)
            for b in self.predictions[k + 1 :]
        ]
        return sum(pairs) / len(pairs)


def percent(condition: Tensor) -> float:
    """The share of True, in percent."""
    return 100.0 * float(condition.double().mean())


@torch.no_grad()
def activation_norms(model: nn.Module, images: Tensor) -> Tensor:
    """The Euclidean norms of the activations of linear and convolution layers for each image, ``(layers, n)``."""
    norms: dict[str, list[Tensor]] = {}
    hooks = []

    def keep(name: str) -> None:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            norms.setdefault(name, []).append(output.flatten(1).norm(dim=1))

        hooks.append(dict(model.named_modules())[name].register_forward_hook(hook))

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            keep(name)
    try:
        for x in images.split(AT_ONCE):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.cat(parts) for parts in norms.values()])


def diversity_scores(norms: Sequence[Tensor]) -> list[float]:
    """The diversity score of each layer (Fig. 4F): the deviation of activation norms over members, mean over images.

    Args:
        norms: The norms of each member, as :func:`activation_norms` gives them.
    """
    found: list[float] = torch.stack(list(norms)).std(dim=0).mean(dim=1).tolist()
    return found


def coherence(model: nn.Module, attacked: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The cosine of two networks' input gradients of the cross-entropy for each image, ``(n,)`` (Fig. 4E)."""
    pairs = zip(images.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
    return torch.cat(
        [
            F.cosine_similarity(_gradient(model, x, y), _gradient(attacked, x, y), dim=1, eps=0.0)
            for x, y in pairs
        ]
    ).nan_to_num(0.0)  # a gradient that vanishes has no direction


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    # The gradients of sure predictions are so small that their norms would underflow. Cosines do not depend on lengths.
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    flat = gradient.flatten(1).double()
    scale: Tensor = flat.abs().amax(dim=1, keepdim=True)
    return flat / scale.clamp_min(torch.finfo(torch.float64).tiny)


def distance(model: nn.Module, other: nn.Module) -> float:
    """The Euclidean distance of two networks' parameters."""
    pairs: Iterable[tuple[Tensor, Tensor]] = zip(
        model.parameters(), other.parameters(), strict=True
    )
    return math.sqrt(sum(float((p.detach() - q.detach()).square().sum()) for p, q in pairs))
