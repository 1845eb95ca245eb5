"""The path: networks on the grid, moved by steps that restore the function of the dense network.

It starts at the nearest network, or where each layer was rounded in turn (``recipes.quantize.layer_rounding``), which
makes good the error of a weight within its layer only. From there steps of ``FIPOptimizer`` without products lower the
drift of the whole quantized network, through all layers at once. What is held are the outputs and those of layers on
the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.geometry import GEOMETRIES
from fipoptim.secondary import OnGrid
from fipoptim.secondary.grid import nearest_on_grid
from recipes.common.layer_inputs import LayerwiseOptions
from recipes.common.options import COUNT, RATE
from recipes.common.progress import Progress
from recipes.common.settings import option
from recipes.quantize.held_outputs import HeldOutputs
from recipes.quantize.layer_rounding import rounded_in_turn
from recipes.quantize.methods.method import Case, Method
from recipes.quantize.settings import QuantizeSettings
from recipes.quantize.straight_through import RoundedWeights


@dataclass(frozen=True, kw_only=True)
class PathOptions:
    """The options of the path.

    Attributes:
        steps: The steps to each number of bits.
        eps: The root mean square of all changes in a step, in steps of the grid, at the top of the schedule.
        precondition: The geometry of a step.
        start: The network that the path starts at: the nearest one, or that of layers rounded in turn.
        rounding_images: The images on which the layers are rounded at the start.
        hold: Names of modules whose outputs are held beside the logits.
    """

    group: ClassVar[str] = "path"

    steps: int = option("steps to each number of bits", default=300, **COUNT)
    eps: float = option(
        "mean change of a weight in a step, in steps of the grid, at the top of the schedule",
        default=1e-2,
        **RATE,
    )
    precondition: str = option(
        "geometry of a step",
        default="adam",
        choices=[name for name in GEOMETRIES if name is not None],
        metavar="NAME",
    )
    start: str = option(
        "network to start at: nearest, or layers (each rounded in turn)",
        default="layers",
        choices=["nearest", "layers"],
    )
    rounding_images: int = option(
        "images, the first ones, on which layers are rounded for that", default=250, **COUNT
    )
    hold: tuple[str, ...] = option(
        "layers whose outputs are held beside the logits", default=(), nargs="*", metavar="LAYER"
    )


class InvariantPath(Method):
    """Rounds a network, then moves it over the grid along a functionally invariant path."""

    title = "path"
    option_kinds = (PathOptions, LayerwiseOptions)

    def steps(self, settings: QuantizeSettings, case: Case) -> int:
        """Those of the path."""
        return settings.of(PathOptions).steps

    def quantize(
        self, model: nn.Module, case: Case, settings: QuantizeSettings, progress: Progress
    ) -> dict[str, OnGrid]:
        """See :class:`Method`."""
        own = settings.of(PathOptions)
        free, scales = self._start(model, case, settings)
        progress(0, own.start)
        dense = case.by_batch()
        factors = HeldOutputs.factors_of(
            dense, own.hold, settings.temperature, case.images[: settings.chunk_size]
        )
        weights = RoundedWeights(model, free, scales, case.bits)
        held = HeldOutputs(model, own.hold, settings.temperature, factors)
        anchors = AnchorBatch(
            held,
            case.images,
            reference=HeldOutputs(dense, own.hold, settings.temperature, factors),
            store="live",  # statistics of batch norm are then those of the same batch for both
            batch_size=min(settings.batch_size, len(case.images)),
            chunk_size=settings.chunk_size,
            generator=torch.Generator().manual_seed(case.seed),
        )
        params = list(held.parameters())
        opt = FIPOptimizer(
            params,
            anchors,
            secondary=lambda: torch.stack([(0 * p).sum() for p in params]).sum(),
            eps=own.eps * math.sqrt(sum(p.numel() for p in params)),
            precondition=own.precondition,
            solver=Solver(products=0),
        )
        scheduler = OneCycleLR(
            opt, max_lr=opt.param_groups[0]["lr"], total_steps=own.steps + 1, cycle_momentum=False
        )
        for _ in range(own.steps):
            opt.step()
            scheduler.step()
            progress(1, f"{case.bits} bits")
        return weights.finish()

    def _start(
        self, model: nn.Module, case: Case, settings: QuantizeSettings
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights that are rounded at the start, and the scale of each channel, by parameter name."""
        own = settings.of(PathOptions)
        if own.start == "nearest":
            free = {name: model.get_parameter(name).detach().clone() for name in case.names}
            return free, {name: nearest_on_grid(w, case.bits).scales for name, w in free.items()}
        batches = case.images[: own.rounding_images].split(settings.chunk_size)
        damping = settings.of(LayerwiseOptions).damping
        found = dict(rounded_in_turn(model, batches, case.bits, damping=damping))
        return (
            {name: layer.before for name, layer in found.items()},
            {name: layer.grid.scales for name, layer in found.items()},
        )
