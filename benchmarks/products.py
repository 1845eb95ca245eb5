"""Time of one metric product ``g v``, beside other ways to compute the same product.

Each time is given as its ratio to one forward and backward pass over the same anchors in the same round. Before
anything is timed, all ways are checked to compute the same product.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    # Dependencies of curvlinops use deprecated parts of torch.
    warnings.simplefilter("ignore")
    from curvlinops import GGNLinearOperator

from benchmarks.cases import CASES, Case
from benchmarks.timing import markdown, ratio, side_by_side
from fipoptim import AnchorBatch, AnchorMetric
from fipoptim.anchors.evaluation import evaluation

BASE = "forward + backward"
WAYS = (
    "fipoptim, repeated product",
    "fipoptim, linearization and first product",
    "fipoptim, not traced",
    "fipoptim, torch.compile",
    "curvlinops GGN product",
    "torch.func jvp + vjp by hand",
    "double-VJP form",
    "dense Jacobian (jacrev), with J kept",
)
DENSE_BYTES = 2**28  # a larger dense Jacobian is not built


def measure(
    case: Case, *, rounds: int, seed: int, device: torch.device, compiled: bool
) -> dict[str, Any]:
    """Times all ways to compute a product on one case.

    Args:
        case: The network and its anchors.
        rounds: The number of timings of each way.
        seed: The seed of the weights, anchors and the vector.
        device: The device that computes.
        compiled: Whether to time the product under ``torch.compile`` as well.

    Returns:
        The timings of each way in ``rows``, the reason for each way that is missing in ``left_out``, the size of the
        case, and the seconds to trace and to compile the network.

    Raises:
        RuntimeError: If the network could not be traced.
        AssertionError: If two ways compute different products.
    """
    model, inputs, _, _ = case.make(seed, device)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    params = list(named.values())
    v = torch.randn(sum(p.numel() for p in params), device=device)
    anchors = AnchorBatch(model, inputs)
    start = time.perf_counter()
    traced = AnchorMetric(anchors, form="forward")
    trace_seconds = time.perf_counter() - start
    if not traced.traced:
        raise RuntimeError(f"{case.name}: the network could not be traced")
    count = len(inputs)
    ways: dict[str, Callable[[], Any]] = {
        BASE: lambda: torch.autograd.grad(model(inputs).square().sum(), params),
        WAYS[0]: lambda: traced.matvec(v),
        WAYS[1]: lambda: AnchorMetric(anchors, params, form="forward").matvec(v),
        WAYS[5]: lambda: _by_hand(model, named, inputs, traced.unflatten(v)),
    }
    metrics = {
        WAYS[2]: AnchorMetric(anchors, form="forward", trace=False),
        WAYS[6]: AnchorMetric(anchors, form="double-vjp"),
    }
    compile_seconds = None
    if compiled:
        start = time.perf_counter()
        metrics[WAYS[3]] = AnchorMetric(anchors, form="forward", compile=True)
        metrics[WAYS[3]].matvec(v)
        compile_seconds = time.perf_counter() - start
    ways |= {name: functools.partial(metric.matvec, v) for name, metric in metrics.items()}
    left_out: dict[str, str] = {}
    with evaluation(model, device, tangents=True):
        try:
            ggn = GGNLinearOperator(
                model,
                nn.MSELoss(reduction="sum"),
                params,
                [(inputs, torch.zeros_like(traced.outputs))],
                check_deterministic=False,
            )
            ways[WAYS[4]] = lambda: (ggn @ v) / (2 * count)
            ways[WAYS[4]]()
        except Exception as error:
            ways.pop(WAYS[4], None)
            left_out[WAYS[4]] = f"{type(error).__name__}: {error}"
        size = 4 * v.numel() * traced.outputs.numel()
        if size <= DENSE_BYTES:
            jacobian = _dense(model, named, inputs)
            ways[WAYS[7]] = lambda: jacobian.T @ (jacobian @ v) / count
        else:
            left_out[WAYS[7]] = f"J takes {size / 2**30:.0f} GiB"
        _check(ways)
        rows = side_by_side(ways, base=BASE, rounds=rounds, device=device, title=case.name)
    return {
        "parameters": v.numel(),
        "anchors": count,
        "trace_seconds": trace_seconds,
        "compile_seconds": compile_seconds,
        "rows": rows,
        "left_out": left_out,
    }


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _by_hand(
    model: nn.Module, named: dict[str, nn.Parameter], inputs: Tensor, tangents: Sequence[Tensor]
) -> Tensor:
    """Returns the product as a user of torch.func would write it."""

    def function(weights: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(model, weights, (inputs,))
        return result

    weights = {name: p.detach() for name, p in named.items()}
    direction = dict(zip(named, tangents, strict=True))
    change = torch.func.jvp(function, (weights,), (direction,))[1]
    pullback = torch.func.vjp(function, weights)[1]
    (result,) = pullback(change / len(inputs))
    return _flat([result[name] for name in named])


def _dense(model: nn.Module, named: dict[str, nn.Parameter], inputs: Tensor) -> Tensor:
    """Returns the Jacobian of all outputs, shape ``(anchors * outputs, parameters)``."""
    weights = {name: p.detach() for name, p in named.items()}
    jacobian = torch.func.jacrev(
        lambda w: torch.func.functional_call(model, w, (inputs,)).reshape(-1), chunk_size=64
    )(weights)
    return torch.cat([jacobian[name].flatten(1) for name in named], dim=1)


def _check(ways: dict[str, Callable[[], Any]]) -> None:
    """Raises an AssertionError with the name of a way that computes another product than the first way."""
    expected = ways[WAYS[0]]()
    for name, run in ways.items():
        if name != BASE:
            torch.testing.assert_close(
                run(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()), msg=name
            )


def run(*, rounds: int, seed: int, device: torch.device, compiled: Sequence[str]) -> dict[str, Any]:
    """Measures all cases; ``compiled`` names the cases to measure under ``torch.compile`` as well."""
    return {
        case.name: measure(
            case, rounds=rounds, seed=seed, device=device, compiled=case.name in compiled
        )
        for case in CASES
    }


def table(results: dict[str, Any]) -> str:
    """Returns the results as a Markdown table with one column for each case."""
    names = list(results)
    rows: list[list[Any]] = [
        ["weights optimized", *(f"{results[n]['parameters']:,}" for n in names)],
        ["anchors", *(results[n]["anchors"] for n in names)],
        [BASE, *(f"1 ({1000 * results[n]['rows'][BASE]['seconds']:.0f} ms)" for n in names)],
    ]
    rows += [[way, *(ratio(results[n]["rows"].get(way)) for n in names)] for way in WAYS]
    rows.append(["seconds to trace", *(f"{results[n]['trace_seconds']:.1f}" for n in names)])
    rows.append(
        [
            "seconds to compile",
            *(
                "–"
                if results[n]["compile_seconds"] is None
                else f"{results[n]['compile_seconds']:.0f}"
                for n in names
            ),
        ]
    )
    return markdown(["", *names], rows)
