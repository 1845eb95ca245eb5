"""Small models of language and texts for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 11


class Language(nn.Module):
    """A causal model with one layer of attention that reads the mask; it gives logits at each position.

    Args:
        masked: Whether the model reads the mask.
        pooled: Whether it gives one row a text instead: the mean over its positions.
    """

    def __init__(self, *, masked: bool = True, pooled: bool = False, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 5)
        self.q, self.k, self.v = (nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, VOCABULARY)
        self.masked, self.pooled, self.causal = masked, pooled, causal
        self.calls: list[tuple[int, ...]] = []
        self.double()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        self.calls.append(tuple(input_ids.shape))
        x = self.embedding(input_ids)
        scores = self.q(x) @ self.k(x).mT
        if self.masked:
            scores = scores.masked_fill(attention_mask[:, None, :] == 0, -1e9)
        x = x + scores.softmax(-1) @ self.v(x)
        if self.pooled:
            counts = attention_mask.unsqueeze(-1).to(x.dtype)
            x = (x * counts).sum(1) / counts.sum(1)
        return {"logits": self.head(torch.tanh(x))}


def batch(*lengths: int, to: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Texts of these lengths, padded to the longest or ``to`` more positions; the padding is not 0."""
    size = to or max(lengths)
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (len(lengths), size), generator=drawn)
    mask = (torch.arange(size) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": ids, "attention_mask": mask}


def logits_alone(model: nn.Module, *batches: dict[str, Tensor]) -> list[Tensor]:
    """The logits ``(length, V)`` of each text, evaluated by itself in its own length."""
    found = []
    for each in batches:
        for ids, mask in zip(each["input_ids"], each["attention_mask"], strict=True):
            size = int(mask.sum())
            with torch.no_grad():
                out = model(ids[None, :size], mask[None, :size])["logits"]
            found.append(out[0])
    return found


def shift(model: nn.Module, by: float = 0.3) -> None:
    """Move all weights, each in another way."""
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=drawn, dtype=torch.float64).to(p))
