"""The spectrum of each layer by itself: the metric over its parameters alone, before and after training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from matplotlib.axes import Axes
from torch import nn

from recipes.common import report
from recipes.common.options import COUNT
from recipes.common.progress import Progress
from recipes.common.settings import option
from recipes.spectrum.measurements.measurement import Measurement, Record, cell, dimension
from recipes.spectrum.settings import SpectrumSettings
from recipes.spectrum.spectra import density_of
from recipes.spectrum.start import Start


@dataclass(frozen=True)
class LayersOptions:
    """How the spectrum of a layer is measured.

    Attributes:
        layer_probes: Random vectors of a density.
        layer_steps: Lanczos steps from each.
    """

    group: ClassVar[str] = "layers"

    layer_probes: int = option("random vectors of a layer's density", default=2, **COUNT)
    layer_steps: int = option("Lanczos steps from each", default=24, **COUNT)


class Layers(Measurement):
    """Largest eigenvalue, trace and effective dimension of each layer with a matrix; its bias belongs to it."""

    title = "layers by themselves"
    option_kinds = (LayersOptions,)

    def units(self, start: Start, settings: SpectrumSettings) -> int:
        """See :class:`Measurement`."""
        return sum(len(layers_of(start.named(m))) for m in start.networks.values())

    def measure(
        self, start: Start, settings: SpectrumSettings, *, seed: int, progress: Progress
    ) -> dict[str, Any]:
        """See :class:`Measurement`."""
        options, found = settings.of(LayersOptions), dict[str, dict[str, Any]]()
        for name, model in start.networks.items():
            form = start.metric(model, trace=False).form
            found[name] = {}
            for layer, params in layers_of(start.named(model)).items():
                # A trace for each layer would take longer than it saves.
                metric = start.metric(model, params, form=form, trace=False)
                found[name][layer] = density_of(
                    metric, settings.mu, options.layer_probes, options.layer_steps, seed
                )
                progress(1, f"{name}, {layer}")
        return {"networks": found}

    def table(self, records: Sequence[Record]) -> str:
        """See :class:`Measurement`."""
        networks = list(records[0]["networks"])
        middle = _middle(records[0])
        mu = next(iter(records[0]["networks"][networks[0]].values()))["dimensions"][middle]["mu"]
        heading = ["", "weights"]
        for name in networks:
            heading += [f"largest, {name}", "trace", f"dimension at {mu:g}"]
        rows = [heading]
        for layer, first in records[0]["networks"][networks[0]].items():
            row = [layer, f"{first['size']:,}"]
            for name in networks:
                spectra = [record["networks"][name][layer] for record in records]
                row += [
                    cell(spectra, lambda s: s["largest"], ".3g"),
                    cell(spectra, lambda s: s["trace"], ".3g"),
                    cell(spectra, dimension(middle), ".1f"),
                ]
            rows.append(row)
        return report.aligned(rows)

    def panels(self) -> Sequence[Callable[[Axes, Record], None]]:
        """See :class:`Measurement`."""
        return [_draw]


def layers_of(named: Mapping[str, nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """The parameters of each layer that has a matrix, by its name; the two matrices of LoRA are one layer."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, p in named.items():
        layer, adapter, _ = name.partition(".lora_")
        found.setdefault(layer if adapter else name.rpartition(".")[0], []).append(p)
    return {layer: params for layer, params in found.items() if any(p.dim() > 1 for p in params)}


def _middle(record: Record) -> int:
    """The number of the damping in the middle."""
    spectrum = next(iter(next(iter(record["networks"].values())).values()))
    return len(spectrum["dimensions"]) // 2


def _draw(axes: Axes, record: Record) -> None:
    for k, (name, layers) in enumerate(record["networks"].items()):
        numbers = range(1, len(layers) + 1)
        largest = [s["largest"] for s in layers.values()]
        mean = [s["trace"] / s["size"] for s in layers.values()]
        axes.plot(numbers, largest, "o-", ms=3, lw=1.2, color=f"C{k}", label=f"{name}, largest")
        axes.plot(numbers, mean, "o:", ms=3, lw=1.2, color=f"C{k}", label=f"{name}, mean")
    axes.set_yscale("log")
    axes.set_xlabel("layer, from the inputs")
    axes.set_ylabel("eigenvalue")
    axes.set_title("layers by themselves")
    axes.legend(frameon=False, fontsize=8)
