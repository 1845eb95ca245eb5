"""Small tasks in float64: a network, its anchors, and the batches of another task that it learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from languages import VOCABULARY, Language
from torch import Tensor, nn

WIDTH, CLASSES = 4, 5
# Divides into equal parts for one to four ranks, and those in halves.
BATCH = 24


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu"
    )


class Task:
    """Points of four numbers that have one of five classes.

    Args:
        count: The number of anchors.
        normed: Whether the network has a batch norm, in training mode.
    """

    def __init__(self, count: int = 48, *, normed: bool = False) -> None:
        self.count, self.normed = count, normed
        self.x = normal(4 * BATCH, WIDTH, seed=1) + 0.5
        self.y = (self.x @ normal(WIDTH, CLASSES, seed=2)).argmax(1)

    def network(self) -> nn.Module:
        torch.manual_seed(5)
        norm = [nn.BatchNorm1d(16)] if self.normed else []
        return nn.Sequential(
            nn.Linear(WIDTH, 16), *norm, nn.Tanh(), nn.Linear(16, CLASSES)
        ).double()

    def anchors(self) -> Any:
        return normal(self.count, WIDTH, seed=3)

    def batch(self, step: int) -> slice:
        """The rows of the batch of one step, of all ranks together."""
        start = step * BATCH % len(self.x)
        return slice(start, start + BATCH)

    def loss(self, model: Callable[..., Any], rows: slice, part: slice) -> Tensor:
        """The mean loss of a part of some rows."""
        return F.cross_entropy(model(self.x[rows][part]), self.y[rows][part])


class Texts(Task):
    """Texts of different lengths, and a model of language that learns texts of one length."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(4)
        self.ids = torch.randint(1, VOCABULARY, (2 * BATCH, 6), generator=drawn)
        self.x = self.ids

    def network(self) -> nn.Module:
        return Language()

    def anchors(self) -> list[dict[str, Tensor]]:
        drawn, found = torch.Generator().manual_seed(6), []
        for count, length in ((5, 3), (4, 7), (6, 5)):
            ids = torch.randint(1, VOCABULARY, (count, length), generator=drawn)
            mask = torch.ones_like(ids)
            mask[0, length - 1] = 0
            found.append({"input_ids": ids, "attention_mask": mask})
        return found

    def loss(self, model: Callable[..., Any], rows: slice, part: slice) -> Tensor:
        ids = self.ids[rows][part]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
