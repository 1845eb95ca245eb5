"""Inputs unlike those of the training, and whether probabilities can be trusted: what an ensemble is often made for.

Images are turned and noisy. Images from outside are those of another data set, or, if there is none on the disk, the
same images with their pixels in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from recipes.common.data import DATASETS, DataError, Task, load_task
from recipes.diversity.measures import Votes, probabilities

CHANGED = 2000  # test images that are turned, noisy, or from outside
TURNED = (15, 30)  # degrees
NOISE = (0.1, 0.2)  # standard deviations, as shares of the pixels' range
BINS = 15  # of the calibration error
OUTSIDE = {"fashion-mnist": "mnist", "cifar10": "cifar100"}


def changed_images(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Turned and noisy copies of images in [0, 1], ``(n, channels, h, w)``, by what was done to them."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        f"turned {degrees}°": rotate(images, degrees, InterpolationMode.BILINEAR)
        for degrees in TURNED
    }
    for size in NOISE:
        drawn = torch.randn(images.shape, generator=generator).to(images)
        found[f"noise {size:g}"] = (images + size * drawn).clamp(0, 1)
    return found


class Outside(NamedTuple):
    """Images in [0, 1] that belong to none of the classes, and what they are."""

    name: str
    images: Tensor


def outside_images(task: Task, data_root: Path) -> Outside:
    """Images from outside, of the shape of the task's.

    Args:
        task: The data set of the networks.
        data_root: The folder of torchvision's data sets.
    """
    try:
        name = OUTSIDE[task.name]
        other = load_task(name, data_root=data_root, download=False)
        return Outside(name, DATASETS[name].pixels(other.test_inputs[:CHANGED]))
    except (KeyError, DataError):
        images = DATASETS[task.name].pixels(task.test_inputs[:CHANGED])
        order = torch.randperm(images[0].numel(), generator=torch.Generator().manual_seed(0))
        return Outside("pixels in another order", images.flatten(1)[:, order].view_as(images))


def calibration_error(p: Tensor, labels: Tensor) -> float:
    """The expected calibration error in percent (Guo et al., 2017), of 15 bins of the likeliest class's probability.

    Args:
        p: Probabilities ``(n, classes)``.
        labels: The right classes ``(n,)``.
    """
    sure, predicted = p.double().max(dim=1)
    right = (predicted == labels).double()
    bins = (sure * BINS).ceil().long().clamp(1, BINS) - 1
    apart = torch.zeros(BINS, dtype=torch.float64, device=p.device).index_add_(
        0, bins, right - sure
    )
    return 100.0 * float(apart.abs().sum()) / len(p)


def log_loss(p: Tensor, labels: Tensor) -> float:
    """The mean negative log-likelihood of the right classes, in nats."""
    right = p.double().gather(1, labels[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
    return -float(right.log().mean())


def told_apart(inside: Tensor, outside: Tensor) -> float:
    """How well the probability of the likeliest class tells inputs from outside: the area under the ROC, in percent.

    Args:
        inside: Probabilities ``(n, classes)`` on the data set's own inputs.
        outside: Probabilities ``(m, classes)`` on inputs from outside.
    """
    sure = torch.cat([inside, outside]).max(dim=1).values.cpu()
    own = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
    return 100.0 * float(roc_auc_score(own.numpy(), sure.numpy()))


class Beyond:
    """What the members of an ensemble say of changed images and of images from outside; they are added one at a time.

    Args:
        images: The test images in [0, 1], ``(n, channels, h, w)``.
        labels: Their labels ``(n,)``.
        outside: Images that belong to none of the classes.
        seed: The seed of the noise.
    """

    def __init__(self, images: Tensor, labels: Tensor, outside: Outside, seed: int) -> None:
        self.labels, self.outside = labels, outside
        self._foreign = outside.images.to(images)
        self._changed = changed_images(images[:CHANGED], seed)
        self._votes = {name: Votes(labels[:CHANGED]) for name in self._changed}
        self._total: Tensor | float = 0.0  # the sum of the members' probabilities outside
        self._trusted: list[dict[str, float]] = []

    def add(self, pixels: nn.Module, p: Tensor) -> None:
        """Adds a member for images in [0, 1], with its probabilities ``(n, classes)`` on the test images."""
        for name, x in self._changed.items():
            self._votes[name].add(probabilities(pixels, x))
        q = probabilities(pixels, self._foreign)
        self._total = self._total + q
        self._trusted.append(self._trust(p, q))

    def record(self, joint: Tensor) -> dict[str, Any]:
        """The record of all members; ``joint`` is the mean of their probabilities on the test images."""
        count = len(self._trusted)
        found = self._trust(joint, torch.as_tensor(self._total) / count)
        return {
            "changed": {name: votes.record() for name, votes in self._votes.items()},
            "outside": self.outside.name,
            "trusted_joint": found,
            "trusted_mean": {name: sum(t[name] for t in self._trusted) / count for name in found},
        }

    def _trust(self, p: Tensor, outside: Tensor) -> dict[str, float]:
        return {
            "calibration_error": calibration_error(p, self.labels),
            "log_loss": log_loss(p, self.labels),
            "told_apart": told_apart(p[:CHANGED], outside),
        }
