"""A trace is used only if it gives what the model gives now, and only if a resumed run would use it too."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver
from fipoptim.anchors import route
from fipoptim.anchors.sample import Sample


class Switched(nn.Module):
    """A body with two heads. Attributes decide what the model computes, and a trace does not see them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 3) for _ in range(2)])
        self.task = 0
        self.cut = False
        self.noise = 0.0
        self.settings = {"scale": 1.0}
        self.mask = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x).tanh() * self.mask
        z = self.heads[self.task](z.detach() if self.cut else z) * self.settings["scale"]
        return z + self.noise * self.drawn(z) if self.noise else z

    def drawn(self, z: Tensor) -> Tensor:
        return torch.randn_like(z)


def change_of_products(anchors: AnchorBatch, **options: Any) -> float:
    """Returns the relative difference between traced products and those of the running model."""
    metric, run = (
        AnchorMetric(anchors, form="forward", trace=trace, **options) for trace in (True, False)
    )
    v = torch.linspace(-1, 1, metric.size)
    torch.testing.assert_close(metric.outputs, run.outputs)
    return float((metric.jvp(v) - run.jvp(v)).norm() / run.jvp(v).norm())


@pytest.mark.parametrize("more", [1, 150, 500])
@pytest.mark.parametrize("chunk_size", [None, 60, 500])
def test_every_trace_that_a_step_uses_is_compared_with_the_model(
    chunk_size: int | None, more: int
) -> None:
    model = Switched()
    anchors = AnchorBatch(model, torch.randn(100, 4), chunk_size=chunk_size)
    AnchorMetric(anchors, form="forward")
    model.task = 1
    anchors.refresh()
    anchors.extend(torch.randn(more, 4))
    assert change_of_products(anchors) < 1e-5
    model.task = 0
    assert change_of_products(anchors) < 1e-5


def cut(model: Switched) -> None:
    model.cut = True  # the outputs stay the same, the derivative changes


def scaled(model: Switched) -> None:
    model.settings["scale"] = 2.0


def masked(model: Switched) -> None:
    model.mask = torch.arange(8) / 8


def masked_in_place(model: Switched) -> None:
    model.mask.mul_(0.5)


def hooked(model: Switched) -> None:
    model.body.register_forward_hook(lambda module, inputs, output: output.detach())


@pytest.mark.parametrize("change", [cut, scaled, masked, masked_in_place, hooked])
def test_a_model_that_is_changed_is_traced_anew(change: Any) -> None:
    model = Switched()
    anchors = AnchorBatch(model, torch.randn(10, 4))
    AnchorMetric(anchors, form="forward")
    change(model)
    assert change_of_products(anchors) < 1e-5


def test_an_unused_trace_is_compared_with_the_model_when_it_is_used_again() -> None:
    model = Switched()
    anchors = AnchorBatch(model, torch.randn(10, 4))
    few = Sample(anchors.inputs[:6], anchors.reference[:6])
    AnchorMetric(anchors, form="forward")
    model.cut = True
    assert change_of_products(anchors, sample=few) < 1e-5
    assert change_of_products(anchors) < 1e-5


def test_a_model_that_mixes_anchors_added_later_is_not_traced() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten()
    )
    anchors = AnchorBatch(model, torch.randn(2, 1, 4, 4))
    AnchorMetric(anchors, form="forward")
    anchors.extend(torch.randn(300, 1, 4, 4))
    anchors.refresh()
    metric = AnchorMetric(anchors, form="forward")
    torch.testing.assert_close(metric.outputs, anchors.reference)
    assert not metric.traced


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_model_that_became_random_is_refused(before: bool, trace: bool) -> None:
    model = Switched()
    anchors = AnchorBatch(model, torch.randn(10, 4))
    if before:
        AnchorMetric(anchors, form="forward", trace=trace)
    model.noise = 0.1
    with pytest.raises(ValueError, match="^model: two evaluations of the same anchors"):
        AnchorMetric(anchors, form="forward", trace=trace)


@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: float(np.random.rand())])
def test_a_model_that_draws_from_python_or_numpy_is_refused(draw: Callable[[], float]) -> None:
    model = Switched()
    anchors = AnchorBatch(model, torch.randn(10, 4))
    AnchorMetric(anchors, form="forward")
    model.drawn = lambda z: draw() * torch.ones_like(z)
    model.noise = 0.1
    with pytest.raises(ValueError, match="^model: two evaluations of the same anchors"):
        AnchorMetric(anchors, form="forward")


@pytest.mark.parametrize("products", [0, 2, "adaptive"])
def test_a_step_of_a_model_that_became_random_moves_nothing(products: int | str) -> None:
    model = Switched()
    anchors = AnchorBatch(model, torch.randn(10, 4))
    optimizer = FIPOptimizer(model.parameters(), anchors, solver=Solver(products=products))
    for _ in range(2):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    model.noise = 0.1
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="^model: two evaluations"):
        optimizer.step()
    assert all(torch.equal(start[name], value) for name, value in model.state_dict().items())


def test_a_model_whose_random_draws_do_not_change_its_outputs_is_accepted() -> None:
    class Drawing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * torch.rand(())

    anchors = AnchorBatch(Drawing(4, 3), torch.randn(5, 4))
    metric = AnchorMetric(anchors)
    assert not metric.traced
    assert float(metric.matvec(torch.ones(metric.size)).norm()) > 0


# --- shapes that depend on values -----------------------------------------------------------------------------


class Routed(nn.Module):
    """Sends each row to one of two experts, so that the number of rows of an expert depends on the inputs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(4, 2, dtype=torch.float64)
        self.experts = nn.ModuleList([nn.Linear(4, 3, dtype=torch.float64) for _ in range(2)])
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        chosen = scores.argmax(dim=1)
        result = x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            here = chosen == i
            if self.how == "mask":
                part = expert(x[here]) * scores[here, i : i + 1].sigmoid()
                result = result.index_add(0, here.nonzero().flatten(), part)
            elif self.how == "select":
                taken = torch.masked_select(x, here[:, None]).reshape(-1, 4)
                result = result.masked_scatter(here[:, None], expert(taken))
            else:
                index = here.nonzero().flatten()
                part = expert(x[index]) * scores[index, i : i + 1].sigmoid()
                result = result.index_add(0, index, part)
        return result


@pytest.mark.parametrize("how", ["nonzero", "mask", "select"])
def test_a_model_with_value_dependent_shapes_is_run_and_not_traced(how: str) -> None:
    model = Routed(how)
    anchors = AnchorBatch(model, torch.randn(30, 4, dtype=torch.float64))
    optimizer = FIPOptimizer(
        model.parameters(), anchors, eps=0.3, solver=Solver(products=3, tol=0.0)
    )
    for i in range(10):
        optimizer.zero_grad()
        x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        model(x).square().sum().backward()
        optimizer.step()
        assert optimizer.last_step.iterations == 3
    assert not AnchorMetric(anchors).traced


def test_a_trace_that_fails_while_it_runs_is_replaced_by_the_model(monkeypatch) -> None:
    from fipoptim.metric.trace import Traced

    def broken(*args: Any) -> Any:
        raise RuntimeError("The expanded size of the tensor (14) must match the existing size (16)")

    model = Switched()
    anchors = AnchorBatch(model, torch.randn(10, 4))
    run = AnchorMetric(anchors, form="forward", trace=False)
    v = torch.linspace(-1, 1, run.size)
    for part in ("tangent", "pullback", "primal"):
        metric = AnchorMetric(anchors, form="forward")
        with monkeypatch.context() as patch:
            patch.setattr(Traced, part, broken)
            if part == "primal":
                metric = AnchorMetric(anchors, form="forward")
                assert not metric.traced
            torch.testing.assert_close(metric.matvec(v), run.matvec(v))


# --- a resumed run uses the same traces ------------------------------------------------------------------------


def run(steps: int, parts: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """A run whose anchors have another number of rows in each step: more shapes than are traced."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    anchors = AnchorBatch(
        model,
        torch.randn(30, 4),
        augment=lambda x: x.repeat(int(torch.randint(1, 40, ())), 1)[:, :],
        generator=torch.Generator().manual_seed(0),
    )
    optimizer = FIPOptimizer(model.parameters(), anchors, eps=0.1, solver=Solver(products=3))
    if parts is not None:
        model.load_state_dict(parts["model"])
        anchors.load_state_dict(parts["anchors"])
        optimizer.load_state_dict(parts["optimizer"])
    advance(model, optimizer, steps)
    return model, anchors, optimizer


def advance(model: nn.Module, optimizer: FIPOptimizer, steps: int) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("way", ["saved", "copied", "pickled"])
def test_a_run_with_more_shapes_than_traces_goes_on_bit_for_bit(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "MOST_TRACES", 3)
    model, anchors, optimizer = run(8)
    assert len(anchors.route.traced) == 3
    if way == "saved":
        file = io.BytesIO()
        parts = {"model": model, "anchors": anchors, "optimizer": optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        other = run(0, torch.load(file, weights_only=True))
    elif way == "copied":
        other = copy.deepcopy((model, anchors, optimizer))
    else:
        anchors.augment = optimizer.anchors.augment = doubled
        other = pickle.loads(pickle.dumps((model, anchors, optimizer)))
    advance(model, optimizer, 6)
    advance(other[0], other[2], 6)
    for a, b in zip(model.parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert anchors.route == other[1].route


def doubled(x: Tensor) -> Tensor:
    return x.repeat(2 + int(torch.randint(40, ())), 1)


def test_a_model_found_changed_too_often_is_run_in_a_resumed_run_too() -> None:
    model = Switched()
    anchors = AnchorBatch(model, torch.randn(10, 4))
    for i in range(12):
        model.task = i % 2
        AnchorMetric(anchors, form="forward")
    assert not anchors.route.traces
    resumed = AnchorBatch(model, torch.randn(10, 4))
    resumed.load_state_dict(anchors.state_dict())
    assert not AnchorMetric(resumed, form="forward").traced
