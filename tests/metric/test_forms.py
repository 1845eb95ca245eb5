"""When products are probed, for which parameters, and products by finite differences."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import oracle
import pytest
import torch
from cases import TOGETHER, build
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver
from fipoptim.metric import forms, tracing


class Probes:
    """Notes the parameters of each probe."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: list[list[Tensor]] = []
        probe = forms.probe

        def noting(anchors: AnchorBatch, params: Sequence[Tensor]) -> Any:
            self.of.append(list(params))
            return probe(anchors, params)

        monkeypatch.setattr(forms, "probe", noting)


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Probes:
    return Probes(monkeypatch)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def step(model: nn.Sequential, optimizer: FIPOptimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(7, 4)).square().sum().backward()
    optimizer.step()


def test_nothing_is_probed_before_a_product_is_taken(probes: Probes) -> None:
    model = network()
    anchors = AnchorBatch(model, torch.randn(9, 4))
    optimizer = FIPOptimizer(model.parameters(), anchors, solver=Solver(products=0), max_drift=9.0)
    for _ in range(3):
        step(model, optimizer)
    optimizer.settle()
    assert probes.of == []
    optimizer.solver = Solver(products=2)
    step(model, optimizer)
    assert optimizer.form == "forward"
    assert len(probes.of) == 1


def test_parameters_that_may_move_later_are_probed_with_the_first(probes: Probes) -> None:
    model = network()
    optimizer = FIPOptimizer(
        model.parameters(), AnchorBatch(model, torch.randn(9, 4)), solver=Solver(products=2)
    )
    model[0].weight.requires_grad_(False)
    step(model, optimizer)
    assert [len(params) for params in probes.of] == [3]
    step(model, optimizer)
    model[2].weight.requires_grad_(False)
    step(model, optimizer)  # fewer than were probed
    assert len(probes.of) == 1
    model.requires_grad_(True)
    step(model, optimizer)  # one that was not
    assert [len(params) for params in probes.of] == [3, 4]


def test_a_restored_network_that_is_within_is_not_probed(probes: Probes) -> None:
    from fipoptim import restore

    model = network()
    assert restore(model, AnchorBatch(model, torch.randn(9, 4)), max_drift=1.0).within
    assert probes.of == []


@pytest.mark.parametrize(
    "name", ["mlp", "cnn-batch-norm", "transformer", "tied", "frozen", "keywords", "two-inputs"]
)
def test_products_by_finite_differences_agree_with_a_dense_solution(name: str) -> None:
    case = build(name)
    assert name not in TOGETHER
    metric = AnchorMetric(AnchorBatch(case.model, case.inputs), form="finite-difference")
    params = [p for p in case.model.parameters() if p.requires_grad]
    g = oracle.metric(oracle.jacobian(case.model, case.inputs, "logits", params))
    v = torch.randn(metric.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(g) @ v
    assert float((metric.matvec(v) - expected).norm()) < 1e-7 * float(expected.norm())
    zero = torch.zeros_like(v)
    assert not bool(metric.jvp(zero).any())
    # J v does not depend on the scale of v.
    torch.testing.assert_close(metric.jvp(1e-9 * v), 1e-9 * metric.jvp(v), rtol=1e-12, atol=0.0)


class Attention(nn.Module):
    """Attention over the inputs; notes whether fused kernels may compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(4, 12), nn.Linear(4, 2)
        self.fused: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.fused.append(torch.backends.cuda.flash_sdp_enabled())
        q, k, v = self.project(x).unsqueeze(1).chunk(3, dim=-1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0, 0])


@pytest.mark.parametrize("form", ["forward", "double-vjp", "finite-difference"])
def test_attention_is_fused_unless_it_is_differentiated_forward_or_twice(form: Any) -> None:
    model = Attention()
    x = torch.randn(6, 5, 4)
    anchors = AnchorBatch(model, x)
    anchors.drift()
    optimizer = FIPOptimizer(model.parameters(), anchors, form=form, solver=Solver(products=0))
    model(x).square().sum().backward()
    optimizer.step()
    assert all(model.fused)
    model.fused.clear()
    AnchorMetric(anchors, form=form, trace=False).matvec(torch.randn(model_size(model)))
    assert all(model.fused) == (form == "finite-difference")
    assert torch.backends.cuda.flash_sdp_enabled()


def model_size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Values(nn.Module):
    """Looks at values, unless it is compiled; as transformers do at an attention mask."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.first, self.last, self.always = nn.Linear(4, 6), nn.Linear(6, 3), always

    def forward(self, x: Tensor) -> Tensor:
        if (self.always or not torch.compiler.is_compiling()) and bool((x > 100).any()):
            x = x / 100
        return self.last(torch.tanh(self.first(x)))


def test_a_model_that_looks_at_values_is_traced_as_torch_compile_sees_it() -> None:
    model, x = Values(always=False), torch.randn(9, 4)
    metric = AnchorMetric(AnchorBatch(model, x), form="forward")
    assert metric.traced
    assert not torch.compiler.is_compiling()
    v = torch.randn(metric.size)
    run = AnchorMetric(AnchorBatch(model, x), form="forward", trace=False)
    torch.testing.assert_close(metric.matvec(v), run.matvec(v))


def test_it_is_said_why_a_model_is_not_traced(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "PATIENCE", 1e6)
    anchors = AnchorBatch(Values(always=True), torch.randn(9, 4))
    with caplog.at_level(logging.WARNING, logger="fipoptim"):
        assert not AnchorMetric(anchors, form="forward").traced
        AnchorMetric(anchors, form="forward")
    (said,) = caplog.messages
    assert said.startswith("The derivative of Values cannot be traced")
    assert "data-dependent control flow" in said


def test_a_trace_that_takes_long_is_announced(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced() -> None:
        assert AnchorMetric(AnchorBatch(network(), torch.randn(9, 4)), form="forward").traced

    monkeypatch.setattr(tracing, "PATIENCE", 1e6)
    with caplog.at_level(logging.WARNING, logger="fipoptim"):
        traced()
        assert caplog.messages == []
        monkeypatch.setattr(tracing, "PATIENCE", 1e-9)
        traced()
    assert re.fullmatch(r"The trace of Sequential took \d+\.\d s\.", caplog.messages[-1])
