"""What the optimizer refuses, by name, before any weight has changed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, FIPOptimizer, Solver


def setup(**options: Any) -> tuple[nn.Module, FIPOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, FIPOptimizer(model.parameters(), AnchorBatch(model, torch.randn(5, 4)), **options)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["beta", "eps", "max_drift", "momentum"])
def test_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: must be .* got {value}"):
        setup(**{name: value})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": 1.0}, ValueError, r"^momentum: must be in \[0, 1\)"),
        ({"beta": "1"}, TypeError, "^beta: must be a number"),
        (
            {"precondition": "rmsprop"},
            ValueError,
            "^precondition: choose None, 'adam' or 'muon', got 'rmsprop'",
        ),
        ({"solver": 3}, TypeError, "^solver: must be a Solver"),
        ({"secondary": 3.0}, TypeError, "^secondary: must be callable"),
    ],
)
def test_options_of_the_wrong_kind(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        setup(**options)


def test_anchors_of_the_wrong_type() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="^anchors: must be an AnchorBatch, got Tensor; build one"):
        FIPOptimizer(model.parameters(), torch.randn(3, 2))  # type: ignore[arg-type]


def test_parameters_of_another_model() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    anchors = AnchorBatch(model, torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"^params: parameter 0 of shape \(2, 2\) does not belong"):
        FIPOptimizer(other.parameters(), anchors)
    opt = FIPOptimizer([model.weight], anchors)
    with pytest.raises(ValueError, match="does not belong to the anchors' model"):
        opt.add_param_group({"params": [other.weight]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.zeros(3, dtype=torch.int64), "int64"),
        (lambda: torch.zeros(3, dtype=torch.complex64), "complex64"),
        (lambda: torch.zeros(3, dtype=torch.bfloat16), "float32 and use torch.autocast"),
        (lambda: torch.zeros(3, 3).to_sparse(), "sparse"),
    ],
)
def test_parameters_without_a_metric(make: Any, what: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.odd = nn.Parameter(make(), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Odd()
    anchors = AnchorBatch(model, torch.randn(3, 2))
    with pytest.raises(TypeError, match=f"^params: .*{what}"):
        FIPOptimizer(model.parameters(), anchors)
    FIPOptimizer(model.layer.parameters(), anchors).step()  # leaving it out is fine


def unchanged_after(model: nn.Module, opt: FIPOptimizer, message: str, closure: Any = None) -> None:
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    with pytest.raises(RuntimeError, match=message):
        opt.step(closure)
    assert all(torch.equal(t, weights[k]) for k, t in model.state_dict().items())
    assert str(opt.state_dict()) == str(state)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver", [None, Solver(products=3), Solver(products=0)])
@pytest.mark.parametrize("precondition", [None, "adam", "muon"])
def test_a_gradient_that_is_not_finite(
    value: float, solver: Solver, precondition: str | None
) -> None:
    model, opt = setup(solver=solver, precondition=precondition, momentum=0.9)
    model(torch.randn(2, 4)).sum().backward()
    opt.step()
    model[0].weight.grad[0, 0] = value  # type: ignore[index,union-attr]
    unchanged_after(model, opt, "^gradient: holds NaN or infinite values; no weight was changed")


def test_outputs_that_are_not_finite_before_the_step() -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.broken = nn.Linear(2, 2), False

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * (math.nan if self.broken else 1.0)

    model = Fragile()
    opt = FIPOptimizer(model.parameters(), AnchorBatch(model, torch.randn(3, 2)))
    model.broken = True
    unchanged_after(
        model, opt, "^model: its outputs on the anchors are not finite at today's weights"
    )


def test_outputs_that_are_not_finite_after_the_step() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5]))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sqrt(self.w)

    model = Root()
    opt = FIPOptimizer(model.parameters(), AnchorBatch(model, torch.ones(2, 1)), eps=1.0)
    model.w.grad = torch.ones(1)
    unchanged_after(model, opt, "not finite after the step; the weights are as they were")


def test_a_closure_that_does_not_call_backward() -> None:
    model, opt = setup()
    x = torch.randn(2, 4)
    unchanged_after(model, opt, "^closure: it left no new gradient", lambda: model(x).sum())
    model(x).sum().backward()  # a gradient of before does not count
    unchanged_after(model, opt, "^closure: it left no new gradient", lambda: model(x).sum())


@pytest.mark.parametrize(
    ("secondary", "message"),
    [
        (lambda: None, "^secondary: must return a scalar loss tensor, got NoneType"),
        (lambda: torch.ones(3, requires_grad=True), r"^secondary: .* got shape \(3,\)"),
        (lambda: torch.tensor(1.0), "^secondary: its loss does not depend on any parameter"),
        (lambda: torch.ones((), requires_grad=True) * 2, "^secondary: its loss depends on none of"),
    ],
)
def test_a_secondary_objective_that_is_none(secondary: Any, message: str) -> None:
    model, opt = setup(secondary=secondary)
    unchanged_after(model, opt, message)


def test_a_grad_scaler() -> None:
    model, opt = setup()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(2, 4)).sum()).backward()
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="^GradScaler: FIPOptimizer cannot be stepped by one"):
        scaler.step(opt)
    assert all(torch.equal(t, weights[k]) for k, t in model.state_dict().items())
    opt.step()  # and it is not remembered against the plain loop


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    x = torch.randint(5, (4, 2))
    opt = FIPOptimizer(model.parameters(), AnchorBatch(model, x))
    model(x).sum().backward()
    unchanged_after(model, opt, "^gradient: is sparse")
