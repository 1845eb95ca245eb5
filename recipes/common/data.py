"""The named data sets of the recipes, whole in memory: alone, split into tasks, or as two tasks that share one head.

Inputs are float32 images ``(n, channels, height, width)``. Pixels are scaled to [0, 1], then normalised to
``(x - mean) / std`` with the mean and standard deviation of each channel over the training split, both in ``DATASETS``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets as torchvision_datasets


class DataError(ValueError):
    """Data or a file that a recipe cannot use: unknown, not there, damaged, or not fitting the rest."""


@dataclass(frozen=True)
class DatasetInfo:
    """What is fixed about a data set.

    Attributes:
        family: Images of one family have the same size and can share a network.
        classes: The number of classes.
        mean: The mean of each channel.
        std: The standard deviation of each channel.
    """

    family: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalized(self, pixels: Tensor) -> Tensor:
        """``(x - mean) / std`` for pixels ``(n, channels, h, w)`` in [0, 1]."""
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(pixels) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def pixels(self, inputs: Tensor) -> Tensor:
        """The pixels in [0, 1] of normalised inputs: the inverse of :meth:`normalized`."""
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(inputs) for v in (self.mean, self.std))
        return (inputs * std + mean).clamp(0, 1)  # rounding may leave the range

    @property
    def black(self) -> Tensor:
        """The value of a black pixel after normalisation, ``(channels, 1, 1)``."""
        return self.normalized(torch.zeros(1, len(self.mean), 1, 1))[0]


DATASETS = {
    "digits": DatasetInfo(family="ten digits", classes=10, mean=(0.3052,), std=(0.3760,)),
    "digits-low": DatasetInfo(family="digits", classes=5, mean=(0.3052,), std=(0.3782,)),
    "digits-high": DatasetInfo(family="digits", classes=5, mean=(0.3053,), std=(0.3738,)),
    "mnist": DatasetInfo(family="mnist", classes=10, mean=(0.1307,), std=(0.3081,)),
    "fashion-mnist": DatasetInfo(family="mnist", classes=10, mean=(0.2860,), std=(0.3530,)),
    "cifar10": DatasetInfo(
        family="cifar",
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": DatasetInfo(
        family="cifar",
        classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}

_FIRST_DIGIT = {"digits": 0, "digits-low": 0, "digits-high": 5}
_TORCHVISION = {
    "mnist": torchvision_datasets.MNIST,
    "fashion-mnist": torchvision_datasets.FashionMNIST,
    "cifar10": torchvision_datasets.CIFAR10,
    "cifar100": torchvision_datasets.CIFAR100,
}
_DIGITS_TEST_FRACTION = 0.25
_DIGITS_SPLIT_SEED = 0  # one split for every run, so that seeds differ in training only


@dataclass(frozen=True)
class Task:
    """A data set as one task of several: its labels start at ``label_offset``.

    Attributes:
        name: The data set's name.
        classes: How many classes this task has.
        label_offset: Its first label; labels are ``label_offset .. label_offset + classes - 1``.
        train_inputs: ``(n, channels, h, w)`` float32, normalised.
        train_labels: ``(n,)`` int64.
        test_inputs: ``(k, channels, h, w)`` float32, normalised as the training inputs.
        test_labels: ``(k,)`` int64.
    """

    name: str
    classes: int
    label_offset: int
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    @property
    def class_range(self) -> tuple[int, int]:
        """The first label and the one after the last."""
        return self.label_offset, self.label_offset + self.classes

    def to(self, device: torch.device) -> Task:
        """The same task with its tensors on ``device``."""
        return replace(
            self,
            train_inputs=self.train_inputs.to(device),
            train_labels=self.train_labels.to(device),
            test_inputs=self.test_inputs.to(device),
            test_labels=self.test_labels.to(device),
        )

    def held_out(self, share: float, *, seed: int = 0) -> Task:
        """The same task with a ``share`` of its training part in place of the test part, which is dropped.

        It serves to choose settings without looking at the test part. Only ``seed`` decides which inputs are held out.
        """
        count = max(1, round(share * len(self.train_inputs)))
        order = torch.randperm(
            len(self.train_inputs), generator=torch.Generator().manual_seed(seed)
        )
        held, kept = order[:count], order[count:]
        return replace(
            self,
            train_inputs=self.train_inputs[kept],
            train_labels=self.train_labels[kept],
            test_inputs=self.train_inputs[held],
            test_labels=self.train_labels[held],
        )


def load_task(
    name: str, *, data_root: str | Path = "data", download: bool = False, label_offset: int = 0
) -> Task:
    """Loads one data set whole.

    Args:
        name: One of ``DATASETS``.
        data_root: The folder of torchvision's data sets; the embedded digits need none.
        download: Whether torchvision may fetch what is not in ``data_root``.
        label_offset: Added to labels that start at 0.

    Raises:
        DataError: If the name is unknown, or the data is not in ``data_root`` and cannot be had.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    info = DATASETS[name]
    root = Path(data_root)
    train_inputs, train_labels = _read(name, root, download, train=True)
    test_inputs, test_labels = _read(name, root, download, train=False)
    return Task(
        name=name,
        classes=info.classes,
        label_offset=label_offset,
        train_inputs=info.normalized(train_inputs),
        train_labels=train_labels + label_offset,
        test_inputs=info.normalized(test_inputs),
        test_labels=test_labels + label_offset,
    )


def split(task: Task, classes: int) -> list[Task]:
    """A data set as a sequence of tasks of ``classes`` classes each, in the order of the labels, on one head.

    Raises:
        DataError: If the classes do not divide into such tasks.
    """
    if task.classes % classes:
        raise DataError(
            f"the {task.classes} classes of {task.name} do not divide into tasks of {classes}"
        )
    tasks = []
    for first in range(task.label_offset, task.label_offset + task.classes, classes):
        parts = []
        for inputs, labels in (
            (task.train_inputs, task.train_labels),
            (task.test_inputs, task.test_labels),
        ):
            chosen = (labels >= first) & (labels < first + classes)
            parts += [inputs[chosen], labels[chosen]]
        tasks.append(Task(task.name, classes, first, *parts))
    return tasks


def load_pair(
    task1: str, task2: str, *, data_root: str | Path = "data", download: bool = False
) -> tuple[Task, Task]:
    """Loads two tasks for one head: task 2's labels follow task 1's.

    Raises:
        DataError: As ``load_task``, and if the two are the same or their images differ in size.
    """
    check_pair(task1, task2)
    first = load_task(task1, data_root=data_root, download=download)
    second = load_task(
        task2, data_root=data_root, download=download, label_offset=DATASETS[task1].classes
    )
    return first, second


def check_pair(task1: str, task2: str) -> str:
    """The family that two named data sets share, before anything is loaded.

    Raises:
        DataError: If a name is unknown, or they are the same, or their images differ in size.
    """
    for name in (task1, task2):
        if name not in DATASETS:
            raise DataError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    if task1 == task2:
        raise DataError(f"task1 and task2 are both {task1!r}: choose two different data sets")
    family = DATASETS[task1].family
    if DATASETS[task2].family != family:
        partners = [n for n, i in DATASETS.items() if i.family == family and n != task1]
        raise DataError(
            f"{task1!r} and {task2!r} have images of different size and cannot share a network: "
            f"beside {task1!r} choose {' or '.join(partners)}"
        )
    return family


def _read(name: str, root: Path, download: bool, *, train: bool) -> tuple[Tensor, Tensor]:
    """One split: inputs ``(n, channels, h, w)`` in [0, 1], labels from 0."""
    if name in _FIRST_DIGIT:
        return _digits(name, train=train)
    return _torchvision(name, root, download, train=train)


def _digits(name: str, *, train: bool) -> tuple[Tensor, Tensor]:
    """scikit-learn's ten digits, or five of them: 8x8 images of grey levels 0 to 16."""
    pixels, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels,
        digits,
        test_size=_DIGITS_TEST_FRACTION,
        stratify=digits,
        random_state=_DIGITS_SPLIT_SEED,
    )
    x, y = (train_x, train_y) if train else (test_x, test_y)
    inputs = torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.as_tensor(y, dtype=torch.int64) - _FIRST_DIGIT[name]
    chosen = (labels >= 0) & (labels < DATASETS[name].classes)
    return inputs[chosen], labels[chosen]


def _torchvision(name: str, root: Path, download: bool, *, train: bool) -> tuple[Tensor, Tensor]:
    """Images of levels 0 to 255, through torchvision's own class."""
    dataset_class = _TORCHVISION[name]
    try:
        dataset = dataset_class(str(root), train=train, download=download)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        below = getattr(dataset_class, "base_folder", f"{dataset_class.__name__}/raw")
        folder = root.resolve() / below
        remedy = (
            "downloading it failed"
            if download
            else "add --download to fetch it, or name with --data-root the folder that holds it"
        )
        raise DataError(f"{name} could not be read from {folder}: {remedy} ({error})") from error
    pixels, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    # Grey images come as (n, h, w), colour ones as (n, h, w, channels).
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.movedim(3, 1)
    return pixels.float() / 255, labels.long()
