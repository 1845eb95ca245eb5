"""Quantization-aware distillation: Adam on the rounded network, which follows the dense network's softened outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fipoptim.secondary import OnGrid
from fipoptim.secondary.grid import nearest_on_grid
from recipes.common.options import COUNT, RATE
from recipes.common.progress import Progress
from recipes.common.settings import option
from recipes.common.training import adam_one_cycle
from recipes.quantize.methods.method import Case, Method
from recipes.quantize.settings import QuantizeSettings
from recipes.quantize.straight_through import RoundedWeights


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """The options of quantization-aware distillation."""

    group: ClassVar[str] = "distillation"

    distillation_steps: int = option("steps to each number of bits", default=500, **COUNT)
    distillation_lr: float = option("Adam's highest learning rate", default=2e-2, **RATE)


class Distillation(Method):
    """Starts at the nearest network, with straight-through derivatives and a scale for each channel that is learnt."""

    title = "distillation"
    option_kinds = (DistillationOptions,)

    def steps(self, settings: QuantizeSettings, case: Case) -> int:
        """Those of Adam."""
        return settings.of(DistillationOptions).distillation_steps

    def quantize(
        self, model: nn.Module, case: Case, settings: QuantizeSettings, progress: Progress
    ) -> dict[str, OnGrid]:
        """See :class:`Method`."""
        own, images = settings.of(DistillationOptions), case.images
        free = {name: model.get_parameter(name).detach().clone() for name in case.names}
        scales = {name: nearest_on_grid(w, case.bits).scales for name, w in free.items()}
        weights = RoundedWeights(model, free, scales, case.bits)
        optimizer, scheduler = adam_one_cycle(
            model, lr=own.distillation_lr, steps=own.distillation_steps
        )
        with torch.no_grad():
            reference = torch.cat([case.dense(x) for x in images.split(settings.chunk_size)])
        soft = (reference / settings.temperature).log_softmax(dim=1)
        size = min(settings.batch_size, len(images))
        generator = torch.Generator().manual_seed(case.seed)
        for _ in range(own.distillation_steps):
            batch = torch.randperm(len(images), generator=generator)[:size].to(images.device)
            optimizer.zero_grad()
            loss = F.kl_div(
                (model(images[batch]) / settings.temperature).log_softmax(dim=1),
                soft[batch],
                reduction="batchmean",
                log_target=True,
            )
            (loss * settings.temperature**2).backward()
            optimizer.step()
            scheduler.step()
            progress(1, f"{case.bits} bits")
        return weights.finish()
