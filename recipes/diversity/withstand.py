"""An objective for ensembles: outputs that do not follow what fools other networks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common.data import DatasetInfo
from recipes.diversity.attacks import Pixels, pgd

STEPS = 3  # of an attack on a batch; the attacks that ensembles are tested with take 20


class Withstand:
    r"""How far the outputs for images that fool other networks are from what these images are without the attack.

    .. math:: L(w) = \frac1N \sum_i \mathrm{KL}\bigl(p_{start}(x_i) \,\|\, p_w(x_i + \delta_i)\bigr)

    with :math:`\delta_i` made by PGD on one of the attacked networks, away from what that network itself says of
    :math:`x_i`: no label is read. Where ``Diversity`` compares gradients at a point, this measures what the whole
    attack changes. As ensemble adversarial training (Tramèr et al., 2018), but with outputs to keep instead of labels.

    Args:
        model: The network that is optimized.
        start: Whose outputs are to be kept; attacked in every second batch, the others in the rest.
        others: More networks to attack; may be none.
        batches: Normalised images and anything, as ``(x, y)``.
        info: Of the data set, to normalise by.
        eps: Most that a pixel changes; each batch draws its own, up to this.
        generator: Of the attacks.
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
        # One pass after the other.
        self.batches: Iterator[tuple[Tensor, Tensor]] = chain.from_iterable(repeat(batches))

    def __call__(self) -> Tensor:
        """The divergence on the next batch, a scalar with a graph to the model's parameters."""
        x, _ = next(self.batches)
        pixels = self.info.pixels(x)
        start, others = self.attacked[0], self.attacked[1:]
        network = start
        if others and self._drawn() < 0.5:
            network = others[int(self._drawn() * len(others))]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                kept = start(pixels).log_softmax(dim=1)
                says = (kept if network is start else network(pixels)).argmax(dim=1)
            seed = int(torch.randint(2**31, (), generator=self.generator))
            eps = self.eps * self._drawn()
            moved = pgd(network, pixels, says, eps, steps=STEPS, seed=seed)
            found = self.model(self.info.normalized(moved)).log_softmax(dim=1)
        return F.kl_div(found, kept, log_target=True, reduction="batchmean")

    def _drawn(self) -> float:
        return float(torch.rand((), generator=self.generator))
