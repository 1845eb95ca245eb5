"""Leading eigenvalues, trace and effective dimension, beside curvlinops: ``python -m benchmarks.spectrum``.

A small network is trained on the digits 0 to 4. The Gauss-Newton matrix of the squared loss is the metric up to a
factor, so curvlinops' operator has the same spectrum. The dense decomposition in float64 says how far each way is off,
at equal products.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

with warnings.catch_warnings():
    # Dependencies of curvlinops use deprecated parts of torch.
    warnings.simplefilter("ignore")
    from curvlinops import GGNLinearOperator, hutchpp_trace
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

from benchmarks import record
from benchmarks.timing import markdown
from fipoptim import AnchorBatch, AnchorMetric
from fipoptim.solver.density import SpectralDensity
from recipes.common.data import load_task
from recipes.common.networks import digits_mlp
from recipes.common.options import SEED, whole
from recipes.common.training import adam_one_cycle, minibatches, seed_everything, train
from recipes.continual.remembered import draw_remembered

EPOCHS = 20  # of the network, on the first task
LEADING = 5


class Counted:
    """A product, and how often it was taken.

    Args:
        product: The product; vectors have shape ``(n,)``, or ``(n, k)`` for k of them.
    """

    def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
        self._product, self.count = product, 0

    def __call__(self, v: Tensor) -> Tensor:
        """The product, or the products with each column."""
        self.count += 1 if v.dim() == 1 else v.shape[1]
        return self._product(v)


class Scaled:
    """The metric as curvlinops sees it: its operator of the squared loss, divided by twice the number of anchors.

    Args:
        operator: The operator of the summed squared loss.
        anchors: The number of anchors.
    """

    def __init__(self, operator: GGNLinearOperator, anchors: int) -> None:
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype

        def product(v: Tensor) -> Tensor:
            result: Tensor = operator @ v
            return result / (2 * anchors)

        self.product = Counted(product)

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product."""
        return self.product(v)


def trained(seed: int, anchors: int) -> tuple[nn.Module, Tensor]:
    """A network that was trained on the digits 0 to 4, in eval mode, and its anchors."""
    seed_everything(seed)
    task, model = load_task("digits-low"), digits_mlp()
    batches = list(minibatches(task, batch_size=32, epochs=EPOCHS, seed=seed))
    optimizer, scheduler = adam_one_cycle(model, lr=3e-3, steps=len(batches))
    train(model, iter(batches), optimizer, scheduler)
    return model.eval(), draw_remembered(task, anchors, seed)[0]


def exact(model: nn.Module, inputs: Tensor) -> Tensor:
    r"""All eigenvalues other than 0, descending, from :math:`\frac1N J J^\top` in float64."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    x = inputs.double()
    jacobian = torch.func.jacrev(
        lambda w: torch.func.functional_call(model, w, (x,)).reshape(-1), chunk_size=200
    )(weights)
    rows = torch.cat([jacobian[name].flatten(1) for name in weights], dim=1)
    values: Tensor = torch.linalg.eigvalsh(rows @ rows.T / len(inputs))
    return values.flip(0).clamp(min=0)


def measure(*, seed: int, anchors: int, probes: int, steps: int, mu: float) -> dict[str, Any]:
    """Measures every way.

    Args:
        seed: The seed of weights, anchors and random vectors.
        anchors: The number of anchors.
        probes: Random vectors of a density.
        steps: Lanczos steps from each.
        mu: The damping of the effective dimension.
    """
    model, inputs = trained(seed, anchors)
    eigenvalues = exact(model, inputs)
    metric = AnchorMetric(AnchorBatch(model, inputs))
    ggn = GGNLinearOperator(
        model,
        nn.MSELoss(reduction="sum"),
        list(model.parameters()),
        [(inputs, torch.zeros_like(metric.outputs))],
        check_deterministic=False,
    )
    theirs = Scaled(ggn, anchors)
    v = torch.randn(metric.size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(theirs @ v, metric.matvec(v), rtol=1e-3, atol=1e-2)

    def leading() -> tuple[Tensor, int]:
        product = Counted(metric.matvec)
        metric.matvec = product  # type: ignore[method-assign]
        try:
            return metric.spectrum(LEADING), product.count
        finally:
            del metric.matvec

    def by_arpack() -> tuple[Tensor, int]:
        operator = Scaled(ggn, anchors)
        wrapped = LinearOperator(
            theirs.shape,
            lambda x: (operator @ torch.as_tensor(x, dtype=theirs.dtype).flatten()).numpy(),
            dtype="float32",
        )
        found = eigsh(wrapped, k=LEADING, tol=1e-4, return_eigenvectors=False)
        return torch.as_tensor(found.copy()).flip(0).double(), operator.product.count

    def our_density() -> tuple[SpectralDensity, int]:
        found = metric.density(probes, steps, generator=torch.Generator().manual_seed(seed))
        return found, found.products

    def their_density() -> tuple[SpectralDensity, int]:
        operator = Scaled(ggn, anchors)
        torch.manual_seed(seed)
        pairs = [fast_lanczos(operator, steps) for _ in range(probes)]
        nodes = torch.stack([values for values, _ in pairs]).double().clamp(min=0)
        weights = torch.stack([vectors[0].square() for _, vectors in pairs]).double()
        count = operator.product.count
        return SpectralDensity(nodes, weights, metric.size, count), count

    def their_trace() -> tuple[float, int]:
        operator = Scaled(ggn, anchors)
        torch.manual_seed(seed)
        asked = probes * steps // 3 * 3
        return float(hutchpp_trace(operator, asked)), operator.product.count

    rows = {}
    for name, way in (
        ("fipoptim, spectrum", leading),
        ("curvlinops, scipy's eigsh", by_arpack),
        ("fipoptim, density", our_density),
        ("curvlinops, fast_lanczos", their_density),
        ("curvlinops, hutchpp_trace", their_trace),
    ):
        began = time.process_time()
        found, products = way()
        row: dict[str, Any] = {"products": products, "cpu_seconds": time.process_time() - began}
        if isinstance(found, Tensor):
            row["leading"] = found.tolist()
        elif isinstance(found, SpectralDensity):
            row["trace"] = found.trace().value
            row["trace_error"] = found.trace().error
            row["dimension"] = found.effective_dimension(mu).value
            row["leading"] = [float(found.nodes.max())]
        else:
            row["trace"] = found
        rows[name] = row
    return {
        "weights": metric.size,
        "outputs": metric.outputs.numel(),
        "mu": mu,
        "exact": {
            "leading": eigenvalues[:LEADING].tolist(),
            "trace": float(eigenvalues.sum()),
            "dimension": float((eigenvalues / (eigenvalues + mu)).sum()),
        },
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    """Returns the results as a Markdown table: how far each way is off, its products and CPU seconds."""
    best = results["exact"]

    def off(row: dict[str, Any], key: str) -> str:
        if key not in row:
            return "–"
        if key == "leading":
            pairs = zip(row[key], best[key], strict=False)
            worst = max(abs(a - b) / b for a, b in pairs)
            return f"{worst:.1e} ({len(row[key])})"
        return f"{row[key]:.4g} ({100 * (row[key] - best[key]) / best[key]:+.1f} %)"

    rows = [
        [
            name,
            *(off(row, key) for key in ("leading", "trace", "dimension")),
            row["products"],
            f"{row['cpu_seconds']:.2f}",
        ]
        for name, row in results["rows"].items()
    ]
    exact_row = ["dense, float64", f"{best['leading'][0]:.4g} is the largest"]
    exact_row += [f"{best['trace']:.4g}", f"{best['dimension']:.4g}", "–", "–"]
    heading = ["", "leading eigenvalues off by (number)", "trace"]
    heading += [f"dimension at {results['mu']:g}", "products", "CPU seconds"]
    return markdown(heading, [exact_row, *rows])


def main() -> None:
    """Measures, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--anchors", type=whole(1), default=100, help="[%(default)s]")
    parser.add_argument("--probes", type=whole(2), default=8, help="[%(default)s]")
    parser.add_argument("--steps", type=whole(1), default=32, help="[%(default)s]")
    parser.add_argument("--mu", type=float, default=1.0, help="[%(default)s]")
    parser.add_argument("--out", type=Path, help="[spectrum.json, with the results]")
    arguments = parser.parse_args()
    if not (math.isfinite(arguments.mu) and arguments.mu > 0):
        parser.error(f"argument --mu: must be above 0, got {arguments.mu:g}")
    options = {key: getattr(arguments, key) for key in ("seed", "anchors", "probes", "steps", "mu")}
    results = measure(**options)
    print(table(results))
    said = " ".join(f"--{key} {value:g}" for key, value in options.items())
    record.write(
        arguments.out or record.RESULTS / "spectrum.json",
        "spectrum",
        torch.device("cpu"),
        {"command": f"python -m benchmarks.spectrum {said}", "results": results},
    )


if __name__ == "__main__":
    main()
