"""A tiny classifier of texts, and texts for it; no weights are downloaded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DRAWN = torch.Generator().manual_seed(0)
OLD = torch.randint(30, (24, 6), generator=_DRAWN)
TOKENS = torch.randint(30, (32, 6), generator=_DRAWN)
LABELS = TOKENS[:, 0] % 3


class Classifier(nn.Module):
    """A network with dropout, called as those of transformers are."""

    def __init__(self, labels: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 8)
        self.hidden = nn.Linear(8, 8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The logits ``(n, labels)``, and the loss if there are labels."""
        mask = attention_mask.unsqueeze(-1)
        mean = (self.embed(input_ids) * mask).sum(1) / mask.sum(1)
        logits = self.head(self.dropout(torch.tanh(self.hidden(mean))))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def inputs(tokens: Tensor) -> dict[str, Tensor]:
    """What the network takes."""
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def dataset() -> list[dict[str, Any]]:
    """TOKENS with their LABELS, as the Trainer takes them."""
    return [
        {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y}
        for x, y in zip(TOKENS, LABELS, strict=True)
    ]
