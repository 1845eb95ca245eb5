"""Attacks on images in [0, 1], by torchattacks; normalisation is part of the attacked model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common.data import DatasetInfo

AT_ONCE = 250


class Pixels(nn.Module):
    """A network for images in [0, 1]: normalises them, then runs the network.

    Args:
        network: The network, which takes normalised images.
        info: The data set, by whose mean and standard deviation the images are normalised.
    """

    def __init__(self, network: nn.Module, info: DatasetInfo) -> None:
        super().__init__()
        self.network = network
        self.info = info

    def forward(self, x: Tensor) -> Tensor:
        """The network's logits ``(n, classes)`` for images ``(n, channels, h, w)`` in [0, 1]."""
        z: Tensor = self.network(self.info.normalized(x))
        return z


class Joint(nn.Module):
    """Several networks as one, whose outputs are the logarithms of their mean probabilities.

    The cross-entropy of these outputs is the ensemble's, with its full gradient: nothing is hidden from an attack.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities ``(n, classes)``."""
        each = torch.stack([member(x).log_softmax(dim=1) for member in self.members])
        return each.logsumexp(dim=0) - math.log(len(self.members))


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
) -> Tensor:
    """Projected gradient descent in the maximum norm (Madry et al., 2018).

    Args:
        model: The attacked model, which takes images in [0, 1]; it is in eval mode during the attack.
        images: The images, ``(n, channels, h, w)`` in [0, 1].
        labels: Their labels, ``(n,)``.
        eps: The largest change of a pixel. With 0, a copy of the images is returned.
        steps: The number of steps. Each has the length ``2.5 eps / steps``, so that any point of the ball can be
            reached and left again.
        restarts: The number of random starts. For each image, the one with the highest loss is taken.
        seed: The seed of the random starts.

    Returns:
        The attacked images, in [0, 1].

    Raises:
        ValueError: If an image is outside [0, 1], or a number is out of range.
    """
    check_images(images)
    _check(eps, steps=steps, restarts=restarts)
    if eps == 0:
        return images.clone()
    import torchattacks  # not at the top: the import takes seconds

    attack = torchattacks.PGD(model, eps=eps, alpha=2.5 * eps / steps, steps=steps)
    found = _in_batches(attack, images, labels, seed)
    # torchattacks' MultiAttack returns the clean image if no restart succeeds, which would weaken the transfer.
    for k in range(1, restarts):
        other = _in_batches(attack, images, labels, seed + k)
        better = _losses(model, other, labels) > _losses(model, found, labels)
        found[better] = other[better]
    return found


def auto_attack(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, classes: int, seed: int = 0
) -> Tensor:
    """AutoAttack (Croce and Hein, 2020), standard version, maximum norm; see :func:`pgd`.

    An image on which the attack fails is returned unchanged. So the result says how many attacks this model withstands,
    and should not be transferred to other models.
    """
    check_images(images)
    _check(eps)
    if eps == 0:
        return images.clone()
    import torchattacks

    attack = torchattacks.AutoAttack(model, norm="Linf", eps=eps, n_classes=classes, seed=seed)
    return _in_batches(attack, images, labels, seed)


def check_images(images: Tensor) -> None:
    """Refuses images that are not in [0, 1].

    Raises:
        ValueError: With the range of their values.
    """
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):  # also refuses NaN
        raise ValueError(
            f"images: must be in [0, 1], got values from {low:.4g} to {high:.4g}; give pixels and leave "
            "normalisation to the model (recipes.diversity.attacks.Pixels)."
        )


def _check(eps: float, **counts: int) -> None:
    if not 0 <= eps <= 1:
        raise ValueError(
            f"eps: must be from 0 to 1, in units of the pixels' range, got {eps!r}; 8/255 is usual."
        )
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: must be 1 or more, got {count}.")


def _in_batches(attack: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    pairs = zip(images.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
    return torch.cat([attack(x, y).detach() for x, y in pairs])


@torch.no_grad()
def _losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    training = model.training
    model.eval()
    pairs = zip(images.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
    found = torch.cat([F.cross_entropy(model(x), y, reduction="none") for x, y in pairs])
    model.train(training)
    return found
