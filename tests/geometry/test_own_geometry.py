"""A geometry from outside the package: a subclass and one line that registers it."""

from __future__ import annotations

import copy

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

import fipoptim
from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver
from fipoptim.geometry import GEOMETRIES, DiagonalGeometry, Geometry


class AdaGrad(DiagonalGeometry):
    """Each weight is measured by the root of the sum of its squared linear terms (Duchi et al., 2011)."""

    @classmethod
    def entries(cls, p: Tensor, matrix: bool | None) -> tuple[str, ...]:
        return ("sum",)

    def diagonal(self, linear: Tensor) -> Tensor:
        flat, memory = self.parameters.flat, self.memory
        sums = [
            total + c.square()
            for total, c in zip(memory.tensors("sum"), flat.unflatten(linear), strict=True)
        ]
        for k, total in enumerate(sums):
            memory.keep("sum", k, total)
        roots = flat.flatten(sums).sqrt()
        return roots + 0.01 * roots.mean()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GEOMETRIES, "adagrad", AdaGrad)


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, torch.randn(5, 3, dtype=torch.float64)


def optimizer(model: nn.Module, inputs: Tensor, **options: object) -> FIPOptimizer:
    options = {"eps": 0.1, "precondition": "adagrad"} | options
    return FIPOptimizer(model.parameters(), AnchorBatch(model, inputs), **options)  # type: ignore[arg-type]


def step(opt: FIPOptimizer, model: nn.Module) -> None:
    opt.zero_grad()
    model(torch.ones(2, 3, dtype=torch.float64)).square().sum().backward()
    opt.step()


def test_the_step_in_a_registered_geometry_equals_the_dense_solution() -> None:
    model, inputs = network()
    opt = optimizer(model, inputs, solver=Solver(products=100, tol=1e-13))
    sums = 0.0
    for _ in range(3):
        metric = AnchorMetric(opt.anchors, form="forward")
        residual = metric.outputs - opt.anchors.reference
        model.zero_grad()
        model(torch.ones(2, 3, dtype=torch.float64)).square().sum().backward()
        b = metric.flatten(p.grad for p in model.parameters() if p.grad is not None)
        c = (b + 2 / len(residual) * metric.vjp(residual)).numpy()
        sums = sums + c**2
        roots = np.sqrt(sums)
        diagonal = roots + 0.01 * roots.mean()
        diagonal /= diagonal.mean()
        before = metric.flatten(model.parameters()).numpy()
        expected, _ = oracle.sphere_step(metric.dense().numpy(), c, 0.1, np.diag(diagonal))
        opt.step()
        after = metric.flatten(model.parameters()).numpy()
        np.testing.assert_allclose(after - before, expected, atol=1e-8)


def test_a_resumed_run_in_a_registered_geometry_continues_bit_for_bit() -> None:
    model, inputs = network()
    opt = optimizer(model, inputs)
    step(opt, model)
    twin = copy.deepcopy(model)
    resumed = FIPOptimizer(twin.parameters(), AnchorBatch(twin, inputs), precondition="adagrad")
    resumed.anchors.load_state_dict(opt.anchors.state_dict())
    resumed.load_state_dict(opt.state_dict())
    for _ in range(2):
        step(opt, model)
        step(resumed, twin)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert all("sum" in entries for entries in resumed.state.values())


def test_a_registered_geometry_without_a_linear_term_is_the_identity() -> None:
    model, inputs = network()
    opt = optimizer(model, inputs)
    opt.step()  # no gradient and no drift: L = 0
    assert opt.last_step is not None
    assert opt.last_step.step_norm == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("diagonal", "message"),
    [
        (lambda c: -torch.ones_like(c), "positive and finite.*least entry -1"),
        (lambda c: torch.full_like(c, torch.nan), "positive and finite"),
        (lambda c: torch.full_like(c, torch.inf), "positive and finite.*mean inf"),
        (lambda c: torch.ones(2), r"shape \(26,\); got shape \(2,\)"),
    ],
)
def test_a_diagonal_that_is_not_a_norm_raises_and_moves_no_weight(
    diagonal: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdaGrad, "diagonal", lambda self, c: diagonal(c))  # type: ignore[operator]
    model, inputs = network()
    opt = optimizer(model, inputs)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=message):
        step(opt, model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not any("step" in entries for entries in opt.state.values())


def test_a_name_is_taken_once_and_by_a_geometry() -> None:
    fipoptim.geometry.register("adagrad", AdaGrad)  # registering the same class again does nothing
    with pytest.raises(ValueError, match="^name: 'adagrad' is the name of AdaGrad already"):
        fipoptim.geometry.register("adagrad", type("Other", (AdaGrad,), {}))
    with pytest.raises(
        TypeError, match="^geometry: must be a subclass of Geometry, got <class 'int'>"
    ):
        fipoptim.geometry.register("numbers", int)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^name: must be a string, got 3"):
        fipoptim.geometry.register(3, AdaGrad)  # type: ignore[arg-type]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    model, inputs = network()
    with pytest.raises(
        ValueError,
        match="^precondition: choose None, 'adam', 'muon' or 'adagrad', got 'shampoo'",
    ):
        optimizer(model, inputs, precondition="shampoo")


def test_the_base_class_asks_for_what_is_missing() -> None:
    with pytest.raises(TypeError, match="update"):
        Geometry(None, None)  # type: ignore[abstract, arg-type]
