"""The objective of outputs that do not follow attacks on other networks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common.data import DATASETS, DatasetInfo
from recipes.common.options import RATE, fraction
from recipes.common.settings import option
from recipes.diversity.attacks import Pixels, pgd
from recipes.diversity.objectives.objective import Loss, Objective, ObjectiveBatches
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.source import EnsembleSource

STEPS = 3  # steps of an attack on a batch; the attacks on finished ensembles take 20


@dataclass(frozen=True, kw_only=True)
class WithstandOptions:
    """The options of the objective."""

    group: ClassVar[str] = "withstood attacks"

    withstand_beta: float = option(
        "weight of the change of outputs under attacks", default=0.3, **RATE
    )
    withstand_eps: float = option(
        "largest change of a pixel by the attacks to withstand",
        default=0.1,
        type=fraction,
        metavar="X",
    )


class Withstand(Objective):
    """Keeps the start network's outputs on images that fool the start network or other members."""

    option_kinds = (WithstandOptions,)

    def weight(self, settings: EnsembleSettings) -> float:
        """See :class:`Objective`."""
        return settings.of(WithstandOptions).withstand_beta

    def loss(
        self,
        model: nn.Module,
        others: Sequence[nn.Module],
        source: EnsembleSource,
        generator: torch.Generator,
    ) -> Loss:
        """See :class:`Objective`."""
        return AttackDivergence(
            model,
            source.start,
            others,
            ObjectiveBatches(source, generator),
            info=DATASETS[source.task.name],
            eps=source.settings.of(WithstandOptions).withstand_eps,
            generator=generator,
            autocast=source.settings.autocast,
        )


class AttackDivergence:
    r"""The divergence of outputs on images that fool other networks from the start network's on unchanged images.

    .. math:: L(w) = \frac1N \sum_i \mathrm{KL}\bigl(p_{start}(x_i) \,\|\, p_w(x_i + \delta_i)\bigr)

    PGD on one of the attacked networks makes :math:`\delta_i`, away from the class that this network itself predicts
    for :math:`x_i`: no label is read. ``fipoptim.secondary.Diversity`` compares gradients at a point; this measures
    everything that the attack changes. Ensemble adversarial training (Tramèr et al., 2018) does the same with labels
    instead of the start network's outputs.

    Args:
        model: The network that is optimized.
        start: The network whose outputs are kept. Half of the batches attack it, the others one of ``others``.
        others: More networks to attack; may be empty.
        batches: Pairs of normalised images ``(n, channels, h, w)`` and anything.
        info: The data set, by whose mean and standard deviation the images are normalised.
        eps: The largest change of a pixel; each batch draws its own, up to this.
        generator: The generator of the attacks.
        autocast: Whether attacks and outputs are computed in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        start: nn.Module,
        others: Sequence[nn.Module],
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        info: DatasetInfo,
        eps: float,
        generator: torch.Generator,
        autocast: bool = False,
    ) -> None:
        self.model, self.info, self.eps, self.generator = model, info, eps, generator
        self.autocast = autocast
        self.attacked = [
            Pixels(copy.deepcopy(network), info).eval().requires_grad_(False)
            for network in (start, *others)
        ]
        # When the batches are exhausted, the next pass begins.
        self.batches: Iterator[tuple[Tensor, Tensor]] = chain.from_iterable(repeat(batches))

    def __call__(self) -> Tensor:
        """The divergence on the next batch, a scalar with a graph to the model's parameters."""
        x, _ = next(self.batches)
        pixels = self.info.pixels(x)
        start, others = self.attacked[0], self.attacked[1:]
        attacked = start
        if others and self._uniform() < 0.5:
            attacked = others[int(self._uniform() * len(others))]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                reference = start(pixels).log_softmax(dim=1)
                predicted = (reference if attacked is start else attacked(pixels)).argmax(dim=1)
            seed = int(torch.randint(2**31, (), generator=self.generator))
            eps = self.eps * self._uniform()
            changed = pgd(attacked, pixels, predicted, eps, steps=STEPS, seed=seed)
            output = self.model(self.info.normalized(changed)).log_softmax(dim=1)
        return F.kl_div(output, reference, log_target=True, reduction="batchmean")

    def _uniform(self) -> float:
        """A random number from 0 to 1."""
        return float(torch.rand((), generator=self.generator))
