"""One spectrum as plain values, and the texts and curves that are made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fipoptim import AnchorMetric
from fipoptim.solver.density import SpectralDensity

Spectrum = Mapping[str, Any]
NULL = 1e-6  # nodes below this share of the largest eigenvalue count as zeros in figures


def spectrum_of(
    metric: AnchorMetric,
    mus: Sequence[float],
    *,
    leading: int,
    probes: int,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """The leading eigenvalues, and the density with the trace and the effective dimension.

    Args:
        metric: The metric.
        mus: The dampings of the effective dimension.
        leading: The number of leading eigenvalues, fewer if the metric has fewer.
        probes: Random vectors of the density.
        steps: Lanczos steps from each.
        seed: The seed of the random vectors.
    """
    values = metric.spectrum(min(leading, metric.size), tol=1e-3)
    return {"leading": values.tolist(), **density_of(metric, mus, probes, steps, seed)}


def density_of(
    metric: AnchorMetric, mus: Sequence[float], probes: int, steps: int, seed: int
) -> dict[str, Any]:
    """The density alone, as plain values; its largest node is the largest eigenvalue after a few steps."""
    found = metric.density(probes, steps, generator=torch.Generator().manual_seed(seed))
    trace = found.trace()
    return {
        "size": metric.size,
        "outputs": metric.outputs.numel(),
        "largest": float(found.nodes.max()),
        "trace": trace.value,
        "trace_error": known(trace.error),
        "dimensions": [
            {"mu": mu, "value": estimate.value, "error": known(estimate.error)}
            for mu, estimate in ((mu, found.effective_dimension(mu)) for mu in mus)
        ],
        "nodes": found.nodes.tolist(),
        "weights": found.weights.tolist(),
    }


def density(spectrum: Spectrum) -> SpectralDensity:
    """The density of plain values."""
    nodes, weights = (
        torch.tensor(spectrum[key], dtype=torch.float64) for key in ("nodes", "weights")
    )
    return SpectralDensity(nodes, weights, spectrum["size"], int((weights > 0).sum()))


def known(value: float) -> float | None:
    """The value; None if it is NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def without_nodes(content: Any) -> Any:
    """The same content without nodes and weights, which ``results.json`` leaves to the files of each seed."""
    if isinstance(content, Mapping):
        return {k: without_nodes(v) for k, v in content.items() if k not in ("nodes", "weights")}
    return [without_nodes(v) for v in content] if isinstance(content, list) else content


def counted(spectrum: Spectrum) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The number of eigenvalues from each node on: nodes, descending, and numbers, of the same shape.

    Nodes that stand for zeros are left out.
    """
    found = density(spectrum)
    nodes, weights = found.nodes.flatten().numpy(), found.weights.flatten().numpy()
    order = np.argsort(-nodes)
    order = order[nodes[order] > NULL * float(nodes.max())]
    return nodes[order], found.size / len(found.nodes) * weights[order].cumsum()
