"""A text encoder learns new kinds of text, and the embeddings of all other texts stay."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.common.data import DataError
from recipes.finetune.case import Case, Examples, Inputs, Unseen, evaluated
from recipes.finetune.heads import fit_head, freeze_unused
from recipes.finetune.networks import EncoderClassifier, pretrained, with_lora
from recipes.finetune.outputs import held
from recipes.finetune.problem import Pool, Problem, Start
from recipes.finetune.settings import FinetuneSettings
from recipes.finetune.texts import learnt_kinds, read_kinds

# The inverse strength of the decay with which the head of the start is fitted, chosen on development texts.
HEAD_C = 0.01


class SearchIndex(nn.Module):
    """The similarities of queries with the texts of an index; the largest is the nearest neighbour's.

    Args:
        texts: The embeddings of the texts by the network of before, ``(M, width)``, of length 1.
    """

    texts: Tensor

    def __init__(self, texts: Tensor) -> None:
        super().__init__()
        self.register_buffer("texts", texts)

    def forward(self, queries: Tensor) -> Tensor:
        """The similarities ``(N, M)`` of embeddings ``(N, width)``."""
        return queries @ self.texts.T


class EncoderProblem(Problem):
    """A pretrained text encoder with a linear head that was fitted to its embeddings.

    Args:
        model: The name of the model, as :func:`recipes.finetune.networks.pretrained` takes it.
        adapter: ``"lora"``, or ``"none"`` to train all weights.
        folder: The folder of texts.
        kinds: The kinds that are learnt, or None for the default.
        settings: The settings.
        development: Whether the texts that are reserved for results are left alone.
        device: The device of the runs.

    Raises:
        DataError: If the model or the texts cannot be loaded, or there are too few texts.
    """

    def __init__(
        self,
        model: str,
        adapter: str,
        folder: Path,
        kinds: Sequence[str] | None,
        settings: FinetuneSettings,
        *,
        development: bool,
        device: torch.device,
    ) -> None:
        texts = read_kinds(folder)
        self._learnt = learnt_kinds(texts, kinds, folder)
        self._new = {name: texts[name] for name in self._learnt}
        self._old = [text for name in texts if name not in self._new for text in texts[name]]
        self._encoder, self._tokenizer = pretrained(model)
        self._adapter, self._settings, self._development = adapter, settings, development
        self._device = device
        self.identity = {
            "model": model,
            "adapter": adapter,
            "texts": {name: len(texts[name]) for name in texts},
            "kinds": self._learnt,
            "development": development,
        }
        self._draw(0)  # refuses too few texts before anything runs

    def start(self, seed: int) -> Start:
        """See :class:`Problem`."""
        of_head, train, test, parts = self._draw(seed)
        torch.manual_seed(seed)
        encoder = copy.deepcopy(self._encoder)
        encoder.requires_grad_(True)
        if self._adapter == "lora":
            encoder = with_lora(encoder, self._settings.rank)
        width = self._encoder.config.hidden_size
        model = EncoderClassifier(encoder, width, len(self._learnt)).to(self._device).eval()
        fit_head(model, of_head, HEAD_C)
        freeze_unused(model, train)
        case = Case(model, train, parts["anchors"], parts["check"])
        index = SearchIndex(evaluated(model, parts["index"], held))
        return Start(case, Unseen(test, parts["queries"], index, "nearest neighbours kept"))

    def _draw(self, seed: int) -> tuple[Examples, Examples, Examples, dict[str, Inputs]]:
        """The examples for the head, for training and for testing, and the parts of the other texts."""
        own = self._settings
        each = -(-own.test // len(self._learnt))
        of_head, train, test = (list[tuple[str, int]]() for _ in range(3))
        for label, (name, texts) in enumerate(self._new.items()):
            pool = Pool(f"texts of {name}", len(texts), development=self._development, seed=seed)
            half = pool.left_unseen // 2 if self._development else pool.left_unseen
            chosen = pool.unseen("test", min(each, half))
            test += [(texts[k], label) for k in chosen.tolist()]
            # A kind with few texts has fewer of each.
            part = min(1.0, pool.left / (own.head + own.train))
            for option, wanted, pairs in (("head", own.head, of_head), ("train", own.train, train)):
                given = pool.given(option, int(part * wanted))
                pairs += [(texts[k], label) for k in given.tolist()]
        pool = Pool("other texts", len(self._old), development=self._development, seed=seed)
        numbers = {name: pool.unseen(name, getattr(own, name)) for name in ("queries", "index")}
        numbers |= {name: pool.given(name, getattr(own, name)) for name in ("anchors", "check")}
        return (
            self._examples("head", of_head),
            self._examples("train", train),
            self._examples("test", test),
            {
                name: self._inputs([self._old[k] for k in rows.tolist()])
                for name, rows in numbers.items()
            },
        )

    def _examples(self, option: str, pairs: Sequence[tuple[str, int]]) -> Examples:
        labels = torch.tensor([label for _, label in pairs], device=self._device)
        if len(labels.unique()) < len(self._learnt):
            raise DataError(f"argument --{option}: a kind has too few texts to give any for it")
        return Examples(self._inputs([text for text, _ in pairs]), labels)

    def _inputs(self, texts: Sequence[str]) -> Inputs:
        encoded: Any = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._settings.max_tokens,
            return_tensors="pt",
        )
        return {name: encoded[name].to(self._device) for name in ("input_ids", "attention_mask")}
