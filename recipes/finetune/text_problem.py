"""A pretrained encoder or language model learns new kinds of text, and what it says of all other texts stays."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recipes.common.data import DataError
from recipes.finetune.case import IGNORED, Case, Examples, Unseen, evaluated
from recipes.finetune.heads import fit_head, freeze_unused
from recipes.finetune.networks import EncoderClassifier, LanguageModel, pretrained, with_lora
from recipes.finetune.outputs import MASK, Inputs, held, tokens
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


class TextProblem(Problem):
    """A pretrained network learns new kinds of text. The base of two problems.

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

    causal: ClassVar[bool]

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
        self.learnt = learnt_kinds(texts, kinds, folder)
        self._new = {name: texts[name] for name in self.learnt}
        self._old = [text for name in texts if name not in self._new for text in texts[name]]
        self._network, self._tokenizer = pretrained(model, causal=self.causal)
        self._adapter, self.settings, self._development = adapter, settings, development
        self.device = device
        self.identity = {
            "model": model,
            "adapter": adapter,
            "texts": {name: len(texts[name]) for name in texts},
            "kinds": self.learnt,
            "development": development,
        }
        self.draw(0)  # refuses too few texts before anything runs

    def network(self, seed: int) -> Any:
        """A copy of the pretrained network; with an adapter, only this requires gradients."""
        torch.manual_seed(seed)
        network = copy.deepcopy(self._network).requires_grad_(True)
        return with_lora(network, self.settings.rank) if self._adapter == "lora" else network

    def draw(self, seed: int) -> tuple[dict[str, list[tuple[str, int]]], dict[str, Inputs]]:
        """The texts of the new kinds with their labels, and the inputs of the others, by part."""
        own = self.settings
        each = -(-own.test // len(self.learnt))
        pairs: dict[str, list[tuple[str, int]]] = {"test": [], "head": [], "train": []}
        for label, (name, texts) in enumerate(self._new.items()):
            pool = Pool(f"texts of {name}", len(texts), development=self._development, seed=seed)
            most = pool.left_unseen // 2 if self._development else pool.left_unseen
            numbers = {"test": pool.unseen("test", min(each, most))}
            # A kind with few texts has fewer of each.
            share = min(1.0, pool.left / (own.head + own.train))
            for part, wanted in (("head", own.head), ("train", own.train)):
                numbers[part] = pool.given(part, int(share * wanted))
            for part, rows in numbers.items():
                if len(rows) == 0:
                    raise DataError(
                        f"argument --{part}: {name} has too few texts to give any for it"
                    )
                pairs[part] += [(texts[k], label) for k in rows.tolist()]
        pool = Pool("other texts", len(self._old), development=self._development, seed=seed)
        others = {name: pool.unseen(name, getattr(own, name)) for name in ("queries", "index")}
        others |= {name: pool.given(name, getattr(own, name)) for name in ("anchors", "check")}
        return pairs, {
            name: self.inputs([self._old[k] for k in rows.tolist()])
            for name, rows in others.items()
        }

    def inputs(self, texts: Sequence[str]) -> Inputs:
        """The tokens of texts, padded to the longest, and their mask."""
        encoded: Any = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.settings.max_tokens,
            return_tensors="pt",
        )
        return {name: encoded[name].to(self.device) for name in ("input_ids", MASK)}


class EncoderProblem(TextProblem):
    """A text encoder learns to tell kinds apart, and its embeddings of all other texts stay."""

    causal = False

    def start(self, seed: int) -> Start:
        """See :class:`Problem`; a linear head has been fitted to the embeddings."""
        pairs, others = self.draw(seed)
        examples = {part: self._examples(texts) for part, texts in pairs.items()}
        encoder = self.network(seed)
        width = encoder.config.hidden_size
        model = EncoderClassifier(encoder, width, len(self.learnt)).to(self.device).eval()
        fit_head(model, examples["head"], HEAD_C)
        freeze_unused(model, examples["train"])
        case = Case(model, examples["train"], others["anchors"], others["check"], held)
        index = SearchIndex(evaluated(model, others["index"], held))
        unseen = Unseen(examples["test"], others["queries"], index, "nearest neighbours kept")
        return Start(case, unseen)

    def _examples(self, pairs: Sequence[tuple[str, int]]) -> Examples:
        labels = torch.tensor([label for _, label in pairs], device=self.device)
        return Examples(self.inputs([text for text, _ in pairs]), labels)


class LanguageProblem(TextProblem):
    """A causal language model learns new kinds of text, and its next tokens in all other texts stay."""

    causal = True

    def start(self, seed: int) -> Start:
        """See :class:`Problem`; there is no head, so its texts are trained on, too."""
        pairs, others = self.draw(seed)
        train = self._examples([*pairs["head"], *pairs["train"]])
        model = LanguageModel(self.network(seed)).to(self.device).eval()
        freeze_unused(model, train)
        case = Case(model, train, others["anchors"], others["check"], tokens)
        test = self._examples(pairs["test"])
        return Start(
            case, Unseen(test, others["queries"], nn.Identity(), "texts with all next tokens kept")
        )

    def _examples(self, pairs: Sequence[tuple[str, int]]) -> Examples:
        """Texts whose labels are the next tokens."""
        inputs = self.inputs([text for text, _ in pairs])
        following = inputs["input_ids"].masked_fill(inputs[MASK] == 0, IGNORED).roll(-1, dims=1)
        following[:, -1] = IGNORED
        return Examples(inputs, following)
