"""Fixtures that several tests of the recipes share."""

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from recipe_helpers import SHORT

from recipes.new_task import command as new_task


@pytest.fixture
def rendered():
    """Has the figures of a test rendered."""


@pytest.fixture(autouse=True)
def few_figures_are_rendered(request, monkeypatch):
    """Figures are put together in every test, but turned into pixels only where a test asks for ``rendered``.

    A run of a recipe spends up to half of its time on pixels. Runs of a session or a module start before this
    fixture does, so their figures are all rendered.
    """
    if "rendered" not in request.fixturenames:

        def signature(self: Figure, path: Path, **options: object) -> None:
            Path(path).write_bytes(b"\x89PNG")

        monkeypatch.setattr(Figure, "savefig", signature)


@pytest.fixture
def image_root(tmp_path):
    """Files as torchvision reads them, tiny: 40 training and 20 test images of random grey levels."""
    generator = torch.Generator().manual_seed(0)
    for folder in ("MNIST", "FashionMNIST"):
        raw = tmp_path / folder / "raw"
        raw.mkdir(parents=True)
        for split, n in (("train", 40), ("t10k", 20)):
            images = torch.randint(0, 256, (n, 28, 28), generator=generator, dtype=torch.uint8)
            labels = torch.arange(n, dtype=torch.uint8) % 10
            for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
                header = bytes([0, 0, 8, values.ndim])
                sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
                content = header + sizes + values.numpy().tobytes()
                (raw / f"{split}-{kind}-ubyte").write_bytes(content)
    return tmp_path


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    arguments = ["--task1", "digits-low", "--task2", "digits-high", "--out", str(out), *SHORT]
    assert new_task.main([*arguments, "--keep-networks"]) == 0
    return out
