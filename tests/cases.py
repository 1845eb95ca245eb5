"""The networks on which numerical code is checked, one list for every test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A convolutional residual block with batch norm and a 1x1 shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.shortcut = nn.Conv2d(2, 3, 1)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.tanh(self.bn1(self.conv1(x)))))
        return self.head(torch.tanh(y + self.shortcut(x)).mean(dim=(2, 3)))


class Encoder(nn.Module):
    """One transformer encoder layer over token indices, read at the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(
            4, nhead=2, dim_feedforward=6, dropout=0.5, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens))[:, 0])


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Keywords(nn.Module):
    """Takes keyword inputs and returns a dict, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        mask = attention_mask.unsqueeze(-1).to(self.head.weight.dtype)
        pooled = (self.embedding(input_ids) * mask).sum(dim=1) / mask.sum(dim=1)
        return {"logits": self.head(torch.tanh(pooled))}


class TwoInputs(nn.Module):
    """Takes a tuple of inputs and gives two outputs for each of two positions: shape (n, 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (torch.tanh(self.left(a)) * self.right(b)).reshape(-1, 2, 2)


@dataclass(frozen=True)
class Case:
    """A model, its anchors and how its parameters go to the optimizer."""

    model: nn.Module
    inputs: Any
    groups: Callable[[nn.Module], Any] = lambda model: model.parameters()


# In these cases the outputs of an anchor depend on the other anchors, so chunks would change the function.
TOGETHER = {"batch-statistics"}


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _mlp() -> Case:
    return Case(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), _normal(5, 4))


def _many_anchors() -> Case:
    # More outputs than weights: g has full rank, and Eq. 4 has no null direction.
    return Case(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), _normal(40, 2))


def _one_anchor() -> Case:
    return Case(nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 3)), _normal(1, 3))


def _cnn() -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return Case(model, _normal(4, 1, 6, 6))


def _batch_statistics() -> Case:
    # Batch norm uses the statistics of the anchors themselves, as in training, so all anchors are one function.
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return Case(model, _normal(4, 1, 4, 4))


def _residual() -> Case:
    return Case(Residual(), _normal(4, 2, 4, 4))


def _encoder() -> Case:
    return Case(Encoder(), torch.randint(7, (5, 3)))


def _tied() -> Case:
    return Case(Tied(), _normal(5, 4))


def _frozen() -> Case:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    return Case(model, _normal(4, 4))


def _groups() -> Case:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        first, _, last = model
        return [
            {"params": [first.weight], "lr": 0.03},
            {"params": [first.bias, last.bias], "beta": 0.3},
            {"params": [last.weight], "lr": 0.002},
        ]

    return Case(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), _normal(5, 4), groups)


def _keywords() -> Case:
    mask = torch.ones(5, 3, dtype=torch.long)
    mask[2, 1:] = 0
    return Case(Keywords(), {"input_ids": torch.randint(7, (5, 3)), "attention_mask": mask})


def _two_inputs() -> Case:
    return Case(TwoInputs(), (_normal(4, 3), _normal(4, 2)))


BUILDERS: dict[str, Callable[[], Case]] = {
    "mlp": _mlp,
    "full-rank": _many_anchors,
    "one-anchor": _one_anchor,
    "cnn-batch-norm": _cnn,
    "batch-statistics": _batch_statistics,
    "residual": _residual,
    "transformer": _encoder,
    "tied": _tied,
    "frozen": _frozen,
    "groups": _groups,
    "keywords": _keywords,
    "two-inputs": _two_inputs,
}


def build(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """Returns the case of this name: the same at every call, in train mode, with non-trivial statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        case = BUILDERS[name]()
        case.model.to(dtype).train()
        for module in case.model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2.0)
    if dtype == torch.float64:
        return case
    inputs = case.inputs
    cast = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
    if isinstance(inputs, Tensor):
        inputs = cast(inputs)
    elif isinstance(inputs, tuple):
        inputs = tuple(map(cast, inputs))
    return Case(case.model, inputs, case.groups)


def all_cases(function: Callable[..., None]) -> Callable[..., None]:
    """Run a test for every case by name."""
    return pytest.mark.parametrize("name", sorted(BUILDERS))(function)


def cases_in_chunks(function: Callable[..., None]) -> Callable[..., None]:
    """Run a test for every case whose anchors can be evaluated in chunks."""
    return pytest.mark.parametrize("name", sorted(BUILDERS.keys() - TOGETHER))(function)


def task_loss(model: nn.Module, inputs: Any) -> Tensor:
    """A smooth secondary objective on other inputs than the anchors."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if isinstance(inputs, Tensor):
            shuffled = inputs.flip(0) * (1 if inputs.dtype == torch.long else 0.7)
            output = model(shuffled)
        elif isinstance(inputs, dict):
            output = model(**{k: v.flip(0).clone() for k, v in inputs.items()})["logits"]
        else:
            output = model(*(0.7 * x.flip(0) + 0.1 for x in inputs))
    target = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return (output - target).square().mean()
