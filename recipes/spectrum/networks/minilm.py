"""MiniLM-L6 with LoRA. Its embeddings are looked at, and kinds of text are new to it, as in ``recipes.finetune``."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from recipes.common.progress import Progress
from recipes.finetune.case import batches, loss
from recipes.finetune.networks import MINILM
from recipes.finetune.problem import Start as TextStart
from recipes.finetune.setups import LORA
from recipes.finetune.text_problem import EncoderProblem
from recipes.spectrum.measurements.layers import LayersOptions
from recipes.spectrum.measurements.moves import MovesOptions
from recipes.spectrum.measurements.path import PathOptions
from recipes.spectrum.networks.network import Given, Network
from recipes.spectrum.settings import SpectrumSettings
from recipes.spectrum.start import Loss, NewTask

STEPS, LR = 30, 1e-3  # of Adam on the new kinds
GRADIENT_TEXTS = 64


class MiniLM(Network):
    """MiniLM-L6 with a new adapter, and with one that was trained on new kinds of text."""

    settings = SpectrumSettings(
        anchors=16,
        leading=5,
        probes=2,
        steps=12,
        top=10,
        mu=(1e-4, 1e-3, 1e-2),
        method_options=(
            MovesOptions(allowed=0.02),
            PathOptions(
                path_steps=6, path_networks=2, path_beta=1.0, path_eps=0.1, path_products=4
            ),
            LayersOptions(layer_probes=1, layer_steps=6),
        ),
    )
    before, after, at_first = "new adapter", "trained adapter", True
    training_steps, trace = STEPS, False

    def __init__(self, given: Given, settings: SpectrumSettings) -> None:
        own = LORA.changed(anchors=settings.anchors, check=1, queries=1, index=2, test=10)
        self._problem = EncoderProblem(
            MINILM, "lora", given.texts, None, own, development=False, device=given.device
        )
        self._batch_size = own.batch_size
        self._starts: dict[int, TextStart] = {}
        self.output: Any = None

    @property
    def identity(self) -> Mapping[str, Any]:
        """See :class:`Network`."""
        return {**self._problem.identity, "training_steps": STEPS, "training_lr": LR}

    def build(self, seed: int) -> nn.Module:
        """See :class:`Network`: the pretrained network, with a head that is fitted to the new kinds."""
        case = self._start(seed).case
        self.output = case.output
        return case.start

    def train(self, model: nn.Module, seed: int, progress: Progress) -> None:
        """See :class:`Network`: Adam on the new kinds."""
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR)
        examples = batches(self._start(seed).case.train, self._batch_size, seed)
        for _, batch in zip(range(STEPS), examples, strict=False):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            progress(1, "new kinds")

    def anchors(self, seed: int) -> Any:
        """See :class:`Network`: texts of other kinds."""
        return dict(self._start(seed).case.anchors)

    def new_task(self, model: nn.Module, seed: int) -> NewTask:
        """See :class:`Network`: the new kinds."""
        train = self._start(seed).case.train
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        whole = train.at(order[:GRADIENT_TEXTS])

        def losses() -> Iterator[Loss]:
            for batch in batches(train, self._batch_size, seed):
                yield functools.partial(loss, batch=batch)

        return NewTask(
            f"{len(self._problem.learnt)} kinds of text",
            functools.partial(loss, batch=whole),
            losses,
        )

    def named(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """See :class:`Network`: those of the adapter, as embeddings do not depend on the head."""
        return {name: p for name, p in super().named(model).items() if ".lora_" in name}

    def _start(self, seed: int) -> TextStart:
        """The start of a seed. Its network is made once and left as it is."""
        if seed not in self._starts:
            self._starts = {seed: self._problem.start(seed)}
        return self._starts[seed]
