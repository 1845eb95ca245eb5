"""How far a network may move before its outputs do: drift against length, along several directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from matplotlib.axes import Axes
from torch import Tensor

from fipoptim import AnchorMetric
from fipoptim.solver.krylov import KrylovSpace
from recipes.common import report
from recipes.common.options import COUNT, RATE
from recipes.common.progress import Progress
from recipes.common.settings import option
from recipes.spectrum.measurements.measurement import Measurement, Record, cell
from recipes.spectrum.settings import SpectrumSettings
from recipes.spectrum.start import Start


@dataclass(frozen=True)
class MovesOptions:
    """The moves that are measured.

    Attributes:
        shortest: The length of the shortest move, relative to the length of all weights.
        longest: That of the longest.
        moves: The number of moves along each direction.
        allowed: The drift up to which the network may move.
    """

    group: ClassVar[str] = "moves"

    shortest: float = option("shortest move, relative to the weights' length", default=1e-4, **RATE)
    longest: float = option("longest move", default=1.0, **RATE)
    moves: int = option("moves along each direction", default=17, **COUNT)
    allowed: float = option("drift up to which the network may move", default=1.0, **RATE)


class Moves(Measurement):
    """Predicted and measured drift of moves from the network that a new task finds."""

    title = "how far the network may move"
    option_kinds = (MovesOptions,)

    def units(self, start: Start, settings: SpectrumSettings) -> int:
        """See :class:`Measurement`."""
        return 5

    def measure(
        self, start: Start, settings: SpectrumSettings, *, seed: int, progress: Progress
    ) -> dict[str, Any]:
        """See :class:`Measurement`."""
        options, metric = settings.of(MovesOptions), start.metric_there
        size = float(metric.flatten(metric.params).norm())
        first, last = (math.log10(size * at) for at in (options.shortest, options.longest))
        lengths = torch.logspace(first, last, options.moves, dtype=torch.float64).tolist()
        found = {}
        for name, direction in directions(start, settings.steps, seed).items():
            sensitivity = float(metric.mean.rms(metric.jvp(direction)) ** 2)
            drifts = [
                float(metric.mean.rms(metric.outputs_after(t * direction) - metric.outputs) ** 2)
                for t in lengths
            ]
            found[name] = {
                "sensitivity": sensitivity,
                "measured": [d if math.isfinite(d) else None for d in drifts],
                "predicted_reach": math.sqrt(options.allowed / sensitivity)
                if sensitivity > 0
                else None,
                "reach": reach(lengths, drifts, options.allowed),
            }
            progress(1, name)
        return {
            "weights_length": size,
            "allowed": options.allowed,
            "lengths": lengths,
            "directions": found,
        }

    def table(self, records: Sequence[Record]) -> str:
        """See :class:`Measurement`."""
        first = records[0]
        rows = [
            ["", "v g v", f"length to drift {first['allowed']:g}, predicted", "measured"],
        ]
        for name in first["directions"]:
            found = [record["directions"][name] for record in records]
            measured = cell(found, lambda f: f["reach"], ".3g")
            if all(f["reach"] is None for f in found):
                measured = f"> {min(record['lengths'][-1] for record in records):.3g}"
            rows.append(
                [
                    name,
                    cell(found, lambda f: f["sensitivity"], ".3g"),
                    cell(found, lambda f: f["predicted_reach"], ".3g"),
                    measured,
                ]
            )
        size = cell(records, lambda r: r["weights_length"], ".3g")
        return f"{report.aligned(rows)}\nall weights together have a length of {size}"

    def panels(self) -> Sequence[Callable[[Axes, Record], None]]:
        """See :class:`Measurement`."""
        return [_draw]


def directions(start: Start, steps: int, seed: int) -> dict[str, Tensor]:
    """Unit vectors ``(n,)`` by name, along which the network moves.

    Args:
        start: The network and the new task.
        steps: Lanczos steps in which the flattest direction is looked for.
        seed: The seed of what is drawn.
    """
    metric, (_, vectors) = start.metric_there, start.subspace
    drawn = torch.randn(
        metric.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(vectors)
    task = -start.gradient
    found = {
        "leading eigenvector": vectors[0],
        f"gradient of {start.new.title}": task,
        f"the same without the top {len(vectors)}": task - vectors.T @ (vectors @ task),
        "random": drawn,
        "nearly null": flattest(metric, drawn, steps),
    }
    return {name: v / v.norm() for name, v in found.items()}


def flattest(metric: AnchorMetric, start: Tensor, steps: int) -> Tensor:
    """The direction in the Krylov space of a vector along which the outputs change least, shape ``(n,)``."""
    space = KrylovSpace(metric.matvec, min(steps, metric.size))
    space.add_start(start)
    while space.extend():
        pass
    return space.combine(torch.linalg.eigh(space.T)[1][:, 0])


def reach(lengths: Sequence[float], drifts: Sequence[float], allowed: float) -> float | None:
    """The length at which the drift passes what is allowed, between two moves by a power law; None if none does."""
    for k, drift in enumerate(drifts):
        if not drift <= allowed:
            if k == 0 or drifts[k - 1] <= 0 or not math.isfinite(drift):
                return lengths[max(0, k - 1)]
            (a, b), (x, y) = lengths[k - 1 : k + 1], drifts[k - 1 : k + 1]
            return float(a * (b / a) ** (math.log(allowed / x) / math.log(y / x)))
    return None


def _draw(axes: Axes, record: Record) -> None:
    for k, (name, found) in enumerate(record["directions"].items()):
        drifts = [d if d else math.nan for d in found["measured"]]
        axes.loglog(record["lengths"], drifts, "-", color=f"C{k}", lw=1.3, label=name)
        predicted = [found["sensitivity"] * t**2 for t in record["lengths"]]
        axes.loglog(record["lengths"], predicted, ":", color=f"C{k}", lw=0.9)
    axes.axhline(record["allowed"], color="0.5", lw=0.8)
    known = [d for f in record["directions"].values() for d in f["measured"] if d]
    axes.set_ylim(max(min(known), 1e-12), 3 * max(known))
    axes.set_xlabel("length of the move")
    axes.set_ylabel("drift")
    axes.set_title("drift of a move (dotted: predicted)")
    axes.legend(frameon=False, fontsize=7)
