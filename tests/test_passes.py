"""What a step costs, counted in evaluations of the model rather than in seconds."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver
from fipoptim.metric import TRACE_AFTER


class Identity(torch.autograd.Function):
    """Passes through, and counts how often it is run forward, forward with a tangent, and backward."""

    generate_vmap_rule = False
    passes: ClassVar[Counter[str]] = Counter()

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        Identity.passes["forward"] += 1
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        Identity.passes["backward"] += 1
        return grad

    @staticmethod
    def jvp(ctx, tangent):  # type: ignore[no-untyped-def]
        Identity.passes["tangent"] += 1
        return tangent.clone()


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Identity.apply(torch.tanh(self.first(x))))


def passes_of_a_step(
    anchors: int = 20, batch: dict[str, int] | None = None, **options: object
) -> Counter[str]:
    model = Counted()
    opt = FIPOptimizer(
        model.parameters(), AnchorBatch(model, torch.randn(anchors, 4), **(batch or {})), **options
    )
    for _ in range(2):  # the second step has a drift to correct
        opt.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        Identity.passes.clear()
        opt.step()
    return Identity.passes


def test_an_accepted_step_takes_one_jacobian_vector_product() -> None:
    # The linearization, the product's own forward, and the measured change.
    passes = passes_of_a_step(beta=1e6)
    assert passes == {"forward": 3, "tangent": 1, "backward": 1}


@pytest.mark.parametrize("products", [1, 3, 6])
def test_each_product_takes_one_tangent_and_one_backward(products: int) -> None:
    passes = passes_of_a_step(solver=Solver(products=products, tol=0.0))
    assert passes == {"forward": 2 + products, "tangent": products, "backward": 1 + products}


def test_the_first_order_step_takes_what_distillation_takes_and_one_product() -> None:
    assert passes_of_a_step(solver=Solver(products=0)) == {
        "forward": 3,
        "tangent": 1,
        "backward": 1,
    }


def test_chunks_multiply_the_passes_and_nothing_else() -> None:
    passes = passes_of_a_step(batch={"chunk_size": 10}, solver=Solver(products=3, tol=0.0))
    # Two chunks: outputs, restoring term, three products (outputs, tangents and back), measured change.
    assert passes == {"forward": 2 + 2 + 3 * 4 + 2, "tangent": 3 * 2, "backward": 2 + 3 * 2}


def test_a_traced_product_runs_the_model_no_more() -> None:
    model = Counted()
    metric = AnchorMetric(AnchorBatch(model, torch.randn(5, 4)))
    v = torch.randn(metric.size)
    for _ in range(TRACE_AFTER + 1):
        metric.matvec(v)
    Identity.passes.clear()
    metric.matvec(v)
    assert Identity.passes["forward"] == 0
    assert Identity.passes["backward"] == 1


def test_a_product_reads_its_vector_in_place() -> None:
    model = Counted()
    metric = AnchorMetric(AnchorBatch(model, torch.randn(5, 4)))
    v = torch.randn(metric.size)
    parts = metric.unflatten(v)
    assert all(p.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() for p in parts)
    weights = metric._weights.parameters
    assert all(weights[k].data_ptr() == p.data_ptr() for k, p in model.named_parameters())
