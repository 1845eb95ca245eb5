"""How different the networks of an ensemble are, and what they withstand."""

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
    """Softmax outputs ``(n, classes)``."""
    return torch.cat([model(x).softmax(dim=1) for x in images.split(AT_ONCE)])


@dataclass
class Votes:
    """Members on one set of images, added one at a time, so that no two need be in memory.

    Attributes:
        labels: ``(n,)``.
        accuracies: Of each member, percent.
        predictions: Of each member ``(n,)``.
    """

    labels: Tensor
    accuracies: list[float] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    total: Tensor | None = None

    def add(self, p: Tensor) -> None:
        """A member's probabilities ``(n, classes)``."""
        self.predictions.append(p.argmax(dim=1))
        self.accuracies.append(percent(self.predictions[-1] == self.labels))
        self.total = p.clone() if self.total is None else self.total + p

    @property
    def joint(self) -> float:
        """Accuracy of the mean of the members' probabilities, percent."""
        assert self.total is not None
        return percent(self.total.argmax(dim=1) == self.labels)

    @property
    def mean(self) -> float:
        """Mean accuracy of the members, percent."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def disagreement(self) -> float:
        """Mean over pairs of members of the share of images that they classify differently, percent."""
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
    """The Euclidean norm of each layer's activation for each image, ``(layers, n)``; linear and convolution layers."""
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
    """For each layer the standard deviation over members of the activation's norm, mean over images (Fig. 4F).

    Args:
        norms: Of each member, as :func:`activation_norms` gives them.
    """
    found: list[float] = torch.stack(list(norms)).std(dim=0).mean(dim=1).tolist()
    return found


def coherence(model: nn.Module, attacked: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """For each image the cosine ``(n,)`` of the input gradients of two networks' cross-entropy (Fig. 4E)."""
    pairs = zip(images.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
    return torch.cat(
        [
            F.cosine_similarity(_gradient(model, x, y), _gradient(attacked, x, y), dim=1, eps=0.0)
            for x, y in pairs
        ]
    ).nan_to_num(0.0)  # where a gradient vanishes


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    # Cosines do not depend on lengths, and the norms of the gradients of sure predictions would underflow.
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    flat = gradient.flatten(1).double()
    scale: Tensor = flat.abs().amax(dim=1, keepdim=True)
    return flat / scale.clamp_min(torch.finfo(torch.float64).tiny)


def distance(model: nn.Module, other: nn.Module) -> float:
    """Euclidean distance of two networks' parameters."""
    pairs: Iterable[tuple[Tensor, Tensor]] = zip(
        model.parameters(), other.parameters(), strict=True
    )
    return math.sqrt(sum(float((p.detach() - q.detach()).square().sum()) for p, q in pairs))
