"""The spectrum of the whole network, before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes

from recipes.common import report
from recipes.common.progress import Progress
from recipes.spectrum.measurements.measurement import Measurement, Record, cell, dimension
from recipes.spectrum.settings import SpectrumSettings
from recipes.spectrum.spectra import counted, spectrum_of
from recipes.spectrum.start import Start


class Whole(Measurement):
    """Leading eigenvalues, density, trace and effective dimension of the whole network."""

    title = "the whole network"

    def units(self, start: Start, settings: SpectrumSettings) -> int:
        """See :class:`Measurement`."""
        return len(start.networks)

    def measure(
        self, start: Start, settings: SpectrumSettings, *, seed: int, progress: Progress
    ) -> dict[str, Any]:
        """See :class:`Measurement`."""
        found = {}
        for name, model in start.networks.items():
            found[name] = spectrum_of(
                start.metric(model),
                settings.mu,
                leading=settings.leading,
                probes=settings.probes,
                steps=settings.steps,
                seed=seed,
            )
            progress(1, name)
        return {"networks": found}

    def table(self, records: Sequence[Record]) -> str:
        """See :class:`Measurement`."""
        first = next(iter(records[0]["networks"].values()))
        count, dampings = len(first["leading"]), [d["mu"] for d in first["dimensions"]]
        rows = [
            ["", "largest", f"no. {count}", "trace", *(f"dimension at {mu:g}" for mu in dampings)]
        ]
        for name in records[0]["networks"]:
            spectra = [record["networks"][name] for record in records]
            rows.append(
                [
                    name,
                    cell(spectra, lambda s: s["leading"][0], ".3g"),
                    cell(spectra, lambda s: s["leading"][-1], ".3g"),
                    _trace(spectra),
                    *(cell(spectra, dimension(k), ".1f") for k in range(len(dampings))),
                ]
            )
        said = (
            f"{first['size']:,} weights, {first['outputs']:,} outputs on the anchors: at most so many eigenvalues are "
            "other than 0"
        )
        return f"{report.aligned(rows)}\n{said}"

    def panels(self) -> Sequence[Callable[[Axes, Record], None]]:
        """See :class:`Measurement`."""
        return [_leading, _density]


def _trace(spectra: Sequence[Record]) -> str:
    """The trace over seeds; of one seed with the standard error over random vectors."""
    text, error = cell(spectra, lambda s: s["trace"], ".3g"), spectra[0]["trace_error"]
    return text if len(spectra) > 1 or error is None else f"{text} ± {error:.1g}"


def _leading(axes: Axes, record: Record) -> None:
    for name, spectrum in record["networks"].items():
        values = spectrum["leading"]
        axes.semilogy(range(1, len(values) + 1), values, "o-", ms=3, lw=1.2, label=name)
    axes.set_xlabel("number")
    axes.set_ylabel("eigenvalue")
    axes.set_title("leading eigenvalues")
    axes.legend(frameon=False, fontsize=8)


def _density(axes: Axes, record: Record) -> None:
    for name, spectrum in record["networks"].items():
        axes.step(*counted(spectrum), where="post", lw=1.2, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("eigenvalues beyond it")
    axes.set_title("density, by Lanczos quadrature")
    axes.legend(frameon=False, fontsize=8)
