"""The spectrum along a path: a few networks of a short run of ``FIPOptimizer`` on the new task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from matplotlib.axes import Axes

from fipoptim import FIPOptimizer, Solver
from recipes.common import report
from recipes.common.options import COUNT, RATE, products
from recipes.common.progress import Progress
from recipes.common.settings import option
from recipes.spectrum.measurements.measurement import Measurement, Record, cell, dimension
from recipes.spectrum.settings import SpectrumSettings
from recipes.spectrum.spectra import density_of
from recipes.spectrum.start import EIGENVECTOR_TOL, Start


@dataclass(frozen=True)
class PathOptions:
    """The run whose networks are looked at.

    Attributes:
        path_steps: Steps of the path.
        path_networks: The networks that are looked at, beside the first.
        path_beta: The weight of the new task.
        path_eps: The length of a step.
        path_products: Metric products of a step.
    """

    group: ClassVar[str] = "path"

    path_steps: int = option("steps of the path", default=40, **COUNT)
    path_networks: int = option("networks looked at, beside the first", default=4, **COUNT)
    path_beta: float = option("weight of the new task", default=10.0, **RATE)
    path_eps: float = option("length of a step", default=0.2, **RATE)
    path_products: str | int = option(
        "metric products a step: a number, or adaptive",
        default="adaptive",
        type=products,
        metavar="N",
    )


class AlongPath(Measurement):
    r"""The spectrum of a few networks on a path, and how far the sensitive subspace has turned.

    The overlap of two subspaces of k directions is :math:`\|U^\top V\|_F^2 / k`: 1 if they are the same.
    """

    title = "along a path"
    option_kinds = (PathOptions,)

    def units(self, start: Start, settings: SpectrumSettings) -> int:
        """See :class:`Measurement`."""
        options = settings.of(PathOptions)
        return options.path_steps + 1 + len(range(0, options.path_steps, _every(options)))

    def measure(
        self, start: Start, settings: SpectrumSettings, *, seed: int, progress: Progress
    ) -> dict[str, Any]:
        """See :class:`Measurement`."""
        options = settings.of(PathOptions)
        model = copy.deepcopy(start.network)
        anchors, params = start.anchors(model), list(start.named(model).values())
        optimizer = FIPOptimizer(
            params,
            anchors,
            beta=options.path_beta,
            eps=options.path_eps,
            solver=Solver(products=options.path_products),
            form=None if start.trace else "finite-difference",  # which takes no trace
            generator=torch.Generator().manual_seed(seed),
        )
        losses = start.new.losses()
        with optimizer.record(every=_every(options)) as path:
            for step in range(1, options.path_steps + 1):
                optimizer.zero_grad()
                next(losses)(model).backward()
                optimizer.step()
                progress(1, f"step {step}")
        first, points = None, []
        for k, point in enumerate(path.metadata):
            path.load_into(model, k)
            metric = start.metric(model)
            values, vectors = metric.eigenvectors(
                min(settings.leading, metric.size), tol=EIGENVECTOR_TOL
            )
            first = vectors if first is None else first
            with torch.no_grad():
                loss = float(start.new.whole(model))
            points.append(
                {
                    "step": point.step,
                    "length": point.length,
                    "drift": float(anchors.drift()),
                    "loss": loss,
                    "leading": values.tolist(),
                    "overlap": float((first @ vectors.T).square().sum()) / len(vectors),
                    **density_of(metric, settings.mu, settings.probes, settings.steps, seed),
                }
            )
            progress(1, f"spectrum after step {point.step}")
        return {"task": start.new.title, "points": points}

    def table(self, records: Sequence[Record]) -> str:
        """See :class:`Measurement`."""
        first = records[0]["points"][0]
        dampings = [d["mu"] for d in first["dimensions"]]
        heading = ["step", "length", "drift", "loss", "largest", "trace"]
        heading += [
            *(f"dimension at {mu:g}" for mu in dampings),
            f"top {len(first['leading'])} kept",
        ]
        rows = [heading]
        for k, point in enumerate(records[0]["points"]):
            same = [record["points"][k] for record in records]
            rows.append(
                [
                    f"{point['step']}",
                    cell(same, lambda p: p["length"], ".3g"),
                    cell(same, lambda p: p["drift"], ".3g"),
                    cell(same, lambda p: p["loss"], ".3f"),
                    cell(same, lambda p: p["leading"][0], ".3g"),
                    cell(same, lambda p: p["trace"], ".3g"),
                    *(cell(same, dimension(j), ".1f") for j in range(len(dampings))),
                    cell(same, lambda p: 100 * p["overlap"], ".0f") + " %",
                ]
            )
        return report.aligned(rows)

    def panels(self) -> Sequence[Callable[[Axes, Record], None]]:
        """See :class:`Measurement`."""
        return [_draw]


def _every(options: PathOptions) -> int:
    """The number of steps from one network that is looked at to the next."""
    return max(1, options.path_steps // options.path_networks)


def _draw(axes: Axes, record: Record) -> None:
    points = record["points"]
    steps, first = [p["step"] for p in points], points[0]
    middle = len(first["dimensions"]) // 2
    curves = {
        "largest eigenvalue": [p["leading"][0] / first["leading"][0] for p in points],
        "trace": [p["trace"] / first["trace"] for p in points],
        f"dimension at {first['dimensions'][middle]['mu']:g}": [
            p["dimensions"][middle]["value"] / first["dimensions"][middle]["value"] for p in points
        ],
        f"top {len(first['leading'])} kept": [p["overlap"] for p in points],
    }
    for name, values in curves.items():
        axes.plot(steps, values, "o-", ms=3, lw=1.2, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"steps on {record['task']}")
    axes.set_ylabel("relative to the start")
    axes.set_title("along a path")
    axes.legend(frameon=False, fontsize=8)
