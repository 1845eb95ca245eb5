"""How much of a new task's gradient lies in the sensitive subspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes

from fipoptim.solver.density import lanczos_quadrature
from recipes.common import report
from recipes.common.progress import Progress
from recipes.spectrum.measurements.measurement import Measurement, Record, cell
from recipes.spectrum.settings import SpectrumSettings
from recipes.spectrum.start import Start

SHOWN = (1, 3, 10, 30, 100, 300, 1000)  # numbers of eigenvectors in the table


class Overlap(Measurement):
    r"""The share of :math:`\|b\|^2` in the span of the leading eigenvectors, and beyond a damping.

    A random vector has k/n of its square there in the mean. Beyond a damping :math:`\mu` the share is
    :math:`b^\top g (g + \mu I)^{-1} b / \|b\|^2`, and that of a random vector the effective dimension over n.
    """

    title = "the new task's gradient in the sensitive subspace"

    def units(self, start: Start, settings: SpectrumSettings) -> int:
        """See :class:`Measurement`."""
        return 3

    def measure(
        self, start: Start, settings: SpectrumSettings, *, seed: int, progress: Progress
    ) -> dict[str, Any]:
        """See :class:`Measurement`."""
        metric, (values, vectors) = start.metric_there, start.subspace
        progress(1, "eigenvectors")
        b = start.gradient / start.gradient.norm()
        shares = (vectors @ b).double().square().cumsum(0)
        nodes, weights = lanczos_quadrature(metric.matvec, b.clone(), settings.steps)
        progress(1, "quadrature of the gradient")
        seeded = torch.Generator().manual_seed(seed)
        density = metric.density(settings.probes, settings.steps, generator=seeded)
        progress(1, "density")
        return {
            "task": start.new.title,
            "size": metric.size,
            "eigenvalues": values.tolist(),
            "shares": shares.tolist(),
            "beyond": [
                {
                    "mu": mu,
                    "share": float((weights * nodes / (nodes + mu)).sum()),
                    "random": density.effective_dimension(mu).value / metric.size,
                }
                for mu in settings.mu
            ],
        }

    def table(self, records: Sequence[Record]) -> str:
        """See :class:`Measurement`."""
        most, size = min(len(r["shares"]) for r in records), records[0]["size"]
        rows = [["", f"share of the gradient of {records[0]['task']}", "of a random vector"]]
        for k in sorted({k for k in SHOWN if k < most} | {most}):
            share = cell(records, _share(k), ".3g")
            rows.append([f"the top {k}", f"{share} %", f"{100 * k / size:.2g} %"])
        for j, beyond in enumerate(records[0]["beyond"]):
            share, random = (cell(records, _beyond(j, key), ".3g") for key in ("share", "random"))
            rows.append([f"beyond {beyond['mu']:g}, softly", f"{share} %", f"{random} %"])
        return report.aligned(rows)

    def panels(self) -> Sequence[Callable[[Axes, Record], None]]:
        """See :class:`Measurement`."""
        return [_draw]


def _share(k: int) -> Callable[[Record], float | None]:
    """What reads the share in the span of the top ``k`` in percent."""
    return lambda record: 100 * float(record["shares"][k - 1])


def _beyond(j: int, key: str) -> Callable[[Record], float | None]:
    """What reads a share beyond the damping number ``j`` in percent."""
    return lambda record: 100 * float(record["beyond"][j][key])


def _draw(axes: Axes, record: Record) -> None:
    shares, size = record["shares"], record["size"]
    numbers = range(1, len(shares) + 1)
    axes.loglog(numbers, shares, lw=1.3, label=f"gradient of {record['task']}")
    axes.loglog(
        numbers, [k / size for k in numbers], "--", color="0.5", lw=1.0, label="random, k/n"
    )
    axes.set_xlabel("leading eigenvectors k")
    axes.set_ylabel("share of the square")
    axes.set_title("gradient in the sensitive subspace")
    axes.legend(frameon=False, fontsize=8)
