"""A small network with old inputs to preserve and another task to learn, for the drop-in tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fipoptim import AnchorBatch


class Net(nn.Module):
    """4 inputs, 3 classes, 67 parameters; at module level so that it can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Task:
    """A network of float64, 5 anchor inputs and 24 labelled inputs of another task, always the same."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Net().double()
            self.old = torch.randn(5, 4, dtype=torch.float64)
            self.x = torch.randn(24, 4, dtype=torch.float64)
            self.y = (self.x @ torch.randn(4, 3, dtype=torch.float64)).argmax(dim=1)

    def anchors(self, **kwargs: Any) -> AnchorBatch:
        return AnchorBatch(self.model, self.old, **kwargs)

    def loss(self, model: nn.Module | None = None) -> Tensor:
        return F.cross_entropy((model or self.model)(self.x), self.y)

    def closure(self, optimizer: Optimizer, model: nn.Module | None = None) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(model)
            loss.backward()
            return loss

        return closure


def flat(model: nn.Module) -> Tensor:
    """A copy of all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same(model: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters agree, bit for bit."""
    return torch.equal(flat(model), flat(other))


def values(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    return {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}


def step_length(optimizer: Optimizer, before: dict[Tensor, Tensor]) -> float:
    """``(Σ_groups ‖v_group‖²/lr_group²)^½``, which is 1; groups whose lr is 0 must not have moved."""
    total = 0.0
    for group in optimizer.param_groups:
        squared = sum(float((p.detach() - before[p]).square().sum()) for p in group["params"])
        if float(group["lr"]) == 0:
            assert squared == 0
        else:
            total += squared / float(group["lr"]) ** 2
    return math.sqrt(total)
