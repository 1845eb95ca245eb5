"""Traces: one serves all weights and inputs of a shape; when models are traced and compiled, and traces freed."""

from __future__ import annotations

import functools
import gc
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import TOGETHER, all_cases, build
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric
from fipoptim.anchors.route import MOST_STALE, MOST_TRACES
from fipoptim.metric import trace_cache
from fipoptim.metric.trace import Traced
from fipoptim.metric.trace_cache import CACHES


def params_of(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


class Scaled(nn.Module):
    """A model whose attributes decide what it computes. They are no weights, so a trace does not see them change."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        self.factor = 1.0
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.layer(x)
        if self.branch and z.sum() > 0:  # control flow that depends on values
            return 2 * z
        return self.factor * z.tanh()


INPUTS = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def test_a_trace_serves_all_weights_and_inputs_of_its_shape() -> None:
    model = Scaled()
    anchors = AnchorBatch(model, INPUTS)
    for _ in range(3):
        with torch.no_grad():
            model.layer.weight.add_(0.1)
        anchors.inputs = anchors.inputs + 0.1
        traced, run = AnchorMetric(anchors), AnchorMetric(anchors, trace=False)
        v = torch.randn(traced.size, dtype=torch.float64)
        torch.testing.assert_close(traced.outputs, run.outputs)
        torch.testing.assert_close(traced.matvec(v), run.matvec(v))
    assert len(CACHES[anchors].by_shape) == 1
    assert anchors.route.stale == 0


def test_a_model_that_keeps_changing_is_retraced_a_few_times_and_then_run() -> None:
    model = Scaled()
    anchors = AnchorBatch(model, INPUTS)
    for i in range(MOST_STALE + 2):
        model.factor = 1.0 + i
        metric, run = AnchorMetric(anchors), AnchorMetric(anchors, trace=False)
        v = torch.randn(metric.size, dtype=torch.float64)
        torch.testing.assert_close(metric.outputs, run.outputs)
        torch.testing.assert_close(metric.matvec(v), run.matvec(v))
        assert metric.traced == (i < MOST_STALE)


def test_a_model_that_cannot_be_traced_is_run() -> None:
    model = Scaled(branch=True)
    anchors = AnchorBatch(model, INPUTS)
    metric = AnchorMetric(anchors)
    assert not metric.traced
    jac = oracle.jacobian(model, INPUTS, "logits", params_of(model))
    v = torch.randn(metric.size, dtype=torch.float64)
    np.testing.assert_allclose(metric.matvec(v).numpy(), oracle.metric(jac) @ v.numpy(), rtol=1e-9)


def test_the_number_of_traced_input_shapes_is_limited() -> None:
    model = Scaled()
    anchors = AnchorBatch(model, INPUTS)
    for count in range(3, MOST_TRACES + 6):
        anchors.inputs = torch.randn(count, 3, dtype=torch.float64)
        metric = AnchorMetric(anchors)
        run = AnchorMetric(anchors, trace=False)
        v = torch.randn(metric.size, dtype=torch.float64)
        torch.testing.assert_close(metric.matvec(v), run.matvec(v))
    assert len(CACHES[anchors].by_shape) == MOST_TRACES


def test_frozen_parameters_are_not_differentiated_by_and_may_change() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    anchors = AnchorBatch(model, INPUTS)
    model[0].requires_grad_(False)
    for _ in range(2):
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        traced, run = AnchorMetric(anchors), AnchorMetric(anchors, trace=False)
        assert traced.names == ["2.weight", "2.bias"]
        v = torch.randn(traced.size, dtype=torch.float64)
        torch.testing.assert_close(traced.matvec(v), run.matvec(v))
    assert len(CACHES[anchors].by_shape) == 1


class Viewing(nn.Module):
    """Reads its feature maps with ``view``, which takes them in one layout only."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, dtype=torch.float64)
        self.head = nn.Linear(3 * 4 * 4, 2, dtype=torch.float64)
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).tanh()
        return self.head(y.view(len(y), -1) if self.view else y.flatten(1))


@pytest.mark.parametrize("view", [False, True])
def test_images_are_traced_channels_last_where_the_model_allows_it(view: bool) -> None:
    model = Viewing(view)
    inputs = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    anchors = AnchorBatch(model, inputs)
    metric = AnchorMetric(anchors)
    assert metric.traced
    assert anchors.route.channels_last == (not view)
    jac = oracle.jacobian(model, inputs, "logits", params_of(model))
    v = torch.randn(metric.size, dtype=torch.float64)
    np.testing.assert_allclose(metric.matvec(v).numpy(), oracle.metric(jac) @ v.numpy(), rtol=1e-9)
    torch.testing.assert_close(metric.outputs_now(), anchors.reference)


@all_cases
def test_the_parts_of_a_trace_compile_without_a_graph_break(name: str, monkeypatch) -> None:
    # Only the absence of graph breaks is tested. The generated code is tested by torch, and needs a C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    case = build(name)
    metric = AnchorMetric(AnchorBatch(case.model, case.inputs), form="forward", compile=True)
    assert metric.traced == (name not in TOGETHER)
    run = AnchorMetric(AnchorBatch(case.model, case.inputs), form="forward", trace=False)
    v = torch.randn(metric.size, dtype=torch.float64)
    torch.testing.assert_close(metric.matvec(v), run.matvec(v))
    torch._dynamo.reset()


def test_a_compiled_trace_is_used_only_if_compile_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_part(part: Any, **options: Any) -> Any:
        compiled.append(part)
        return part

    monkeypatch.setattr(torch, "compile", compile_part)
    anchors = AnchorBatch(Scaled(), INPUTS)
    for compile, parts in ((False, 0), (True, 3), (False, 3), (True, 3)):
        assert AnchorMetric(anchors, form="forward", compile=compile).traced
        assert len(compiled) == parts
    assert len(CACHES[anchors].by_shape) == 2
    assert len(anchors.route.traced) == 1  # one shape, whether compiled or not


def test_traces_are_freed_with_their_anchors() -> None:
    gc.collect()
    before = len(CACHES)
    anchors = AnchorBatch(Scaled(), INPUTS)
    AnchorMetric(anchors)
    assert len(CACHES) == before + 1
    del anchors
    gc.collect()
    assert len(CACHES) == before


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_outputs_that_depend_on_the_other_anchors_are_never_traced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, made = build(name), []

    class Counted(Traced):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(*args, **options)

    monkeypatch.setattr(trace_cache, "Traced", Counted)
    anchors = AnchorBatch(case.model, case.inputs)
    for _ in range(4):
        AnchorMetric(anchors)
        with torch.no_grad():
            for p in case.model.parameters():
                p.mul_(1.01)
    assert not made
