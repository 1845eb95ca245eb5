"""The step against an independent dense solution, for every network, output space and geometry."""

from __future__ import annotations

import copy
import math

import numpy as np
import oracle
import pytest
import torch
from cases import Case, all_cases, build, task_loss
from torch import Tensor, nn

from fipoptim import AnchorBatch, FIPOptimizer, Solver

EXACT = Solver(products=10_000, tol=1e-14)


def dense_geometry(
    opt: FIPOptimizer, params: list[Tensor], linear: np.ndarray
) -> tuple[np.ndarray, float]:
    """Returns dense P and the radius of its ball at the first step, as the documentation defines them."""
    group_of = {p: g for g in opt.param_groups for p in g["params"]}
    rate = np.concatenate([np.full(p.numel(), group_of[p]["lr"]) for p in params])
    # After one step the running mean of c^2, corrected for its start, is c^2.
    geometry = np.eye(len(linear)) if opt.precondition is None else np.diag(np.abs(linear))
    if opt.precondition == "muon":
        start = 0
        modules = opt.anchors.model.modules()
        tables = {m.weight for m in modules if isinstance(m, nn.Embedding)}
        for p in params:
            block = slice(start, start + p.numel())
            if p.dim() >= 2 and min(len(p), p[0].numel()) > 1 and p not in tables:
                geometry[block, block] = oracle.of_matrix(linear[block].reshape(len(p), -1))
            start += p.numel()
    if opt.precondition is not None:
        geometry = oracle.damped(geometry)
    return geometry / np.outer(rate, rate), 1.0


@pytest.mark.parametrize("space", sorted(oracle.SPACES))
@all_cases
def test_the_step_is_the_dense_solution(name: str, space: str) -> None:
    case = build(name)
    model = case.model
    anchors = AnchorBatch(model, case.inputs, output=oracle.SPACES[space][0])
    # The network is away from the reference, so that there is a drift to correct.
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.requires_grad:
                p.add_(0.02 * torch.cos(torch.arange(p.numel(), dtype=p.dtype) + i).view(p.shape))
    away = copy.deepcopy(model.state_dict())
    params = [p for p in model.parameters() if p.requires_grad]
    jac = oracle.jacobian(model, case.inputs, space, params)
    columns = dict(
        zip(params, np.split(jac, np.cumsum([p.numel() for p in params])[:-1], axis=2), strict=True)
    )
    # All geometries start from the same network and share its trace.
    for precondition in (None, "adam", "muon"):
        model.load_state_dict(away)
        check_step(case, anchors, columns, space, precondition)


def check_step(
    case: Case,
    anchors: AnchorBatch,
    columns: dict[Tensor, np.ndarray],
    space: str,
    precondition: str | None,
) -> None:
    """A step against the dense solution; ``columns`` are those of the Jacobian, by parameter."""
    model = case.model
    opt = FIPOptimizer(
        case.groups(model), anchors, beta=0.5, eps=0.01, precondition=precondition, solver=EXACT
    )
    params = [p for g in opt.param_groups for p in g["params"] if p.requires_grad]
    model.eval()
    gradient = torch.autograd.grad(task_loss(model, case.inputs), params)
    model.train()
    for p, b in zip(params, gradient, strict=True):
        p.grad = b

    jac = np.concatenate([columns[p] for p in params], axis=2)
    z = oracle.outputs(model, case.inputs, space, {}).detach().double().numpy()
    residual = z - anchors.reference.double().numpy()
    assert np.abs(residual).max() > 1e-6
    beta_of = {p: g["beta"] for g in opt.param_groups for p in g["params"]}
    betas = np.concatenate([np.full(p.numel(), beta_of[p]) for p in params])
    g = oracle.metric(jac)
    c = betas * oracle.flat(gradient) + 2 * np.einsum("ikn,ik->n", jac, residual) / len(jac)
    weight, length = dense_geometry(opt, params, c)
    start = oracle.flat(params)
    opt.step()
    v = oracle.flat(params) - start

    # Singular values from a Gram matrix are accurate to the square root of the rounding error.
    assert np.sqrt(v @ weight @ v) == pytest.approx(
        length, rel=1e-7 if precondition == "muon" else 1e-9
    )
    info = opt.last_step
    assert info is not None
    assert info.residual is not None
    assert info.residual < 1e-9
    root, inverse = oracle.roots(weight)
    scaled = inverse @ g @ inverse
    low = np.linalg.eigvalsh(scaled)[0]
    null_free = np.linalg.norm(np.linalg.pinv(scaled, rcond=1e-12) @ inverse @ c) / 2
    if null_free < length and low < 1e-9:
        # In the hard case any filling from the null space solves Eq. 4; only the parts that it fixes are compared.
        expected, multiplier = oracle.sphere_step(g, c, length, weight, direction=v)
        assert oracle.objective(g, c, v) == pytest.approx(
            oracle.objective(g, c, expected), rel=1e-6
        )
    else:
        expected, multiplier = oracle.sphere_step(g, c, length, weight, direction=v)
    error = np.linalg.norm(root @ (v - expected)) / np.linalg.norm(root @ expected)
    assert error < 1e-6
    # One group measures lengths in Euclidean units; several in units of the largest rate.
    unit = max(float(group["lr"]) for group in opt.param_groups) ** 2
    assert info.multiplier * unit == pytest.approx(multiplier, rel=1e-6, abs=1e-12 * unit)
    assert info.output_change_predicted == pytest.approx(np.sqrt(v @ g @ v), rel=1e-6, abs=1e-10)


def small(
    beta: float, eps: float, **options: object
) -> tuple[nn.Module, AnchorBatch, FIPOptimizer, Tensor]:
    """A network with gradients in place, its optimizer and its anchors' inputs."""
    case = build("mlp")
    anchors = AnchorBatch(case.model, case.inputs)
    opt = FIPOptimizer(
        case.model.parameters(), anchors, beta=beta, eps=eps, solver=EXACT, **options
    )
    task_loss(case.model, case.inputs).backward()
    return case.model, anchors, opt, case.inputs


def moved(model: nn.Module, opt: FIPOptimizer) -> np.ndarray:
    params = list(model.parameters())
    start = oracle.flat(params)
    opt.step()
    return oracle.flat(params) - start


def test_without_a_metric_the_step_is_the_normalised_gradient() -> None:
    # The outputs do not depend on the weights: g = 0.
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * self.layer.weight.sum()

    model = Constant()
    anchors = AnchorBatch(model, torch.randn(4, 3, dtype=torch.float64))
    opt = FIPOptimizer(model.parameters(), anchors, eps=0.1, solver=EXACT)
    model.layer(torch.ones(1, 3, dtype=torch.float64)).square().sum().backward()
    gradient = oracle.flat([p.grad for p in model.parameters()])
    v = moved(model, opt)
    np.testing.assert_allclose(v, -0.1 * gradient / np.linalg.norm(gradient), rtol=1e-9)


def test_a_large_beta_gives_the_normalised_gradient() -> None:
    model, _, opt, _ = small(beta=1e9, eps=0.01)
    gradient = oracle.flat([p.grad for p in model.parameters()])
    v = moved(model, opt)
    np.testing.assert_allclose(v, -0.01 * gradient / np.linalg.norm(gradient), atol=1e-8)


def test_a_small_beta_leaves_the_outputs_alone_to_first_order() -> None:
    changes, predicted = [], []
    for eps in (1e-2, 5e-3):
        model, _, opt, _ = small(beta=1e-7, eps=eps)
        v = moved(model, opt)
        assert opt.last_step is not None
        changes.append(opt.last_step.output_change)
        predicted.append(opt.last_step.output_change_predicted)
        assert np.linalg.norm(v) == pytest.approx(eps, rel=1e-9)
    assert max(predicted) < 1e-6 * max(changes) + 1e-6
    # The remaining change is the curvature of the path, which is of second order in the length.
    assert changes[0] / changes[1] == pytest.approx(4, rel=0.1)


def test_a_small_beta_is_the_projected_gradient() -> None:
    model, _, opt, inputs = small(beta=1e-9, eps=1e-2)
    params = list(model.parameters())
    jac = oracle.jacobian(model, inputs, "logits", params)
    stacked = jac.reshape(-1, jac.shape[2])
    gradient = oracle.flat([p.grad for p in params])
    projected = gradient - np.linalg.pinv(stacked) @ (stacked @ gradient)
    v = moved(model, opt)
    np.testing.assert_allclose(v, -1e-2 * projected / np.linalg.norm(projected), atol=1e-5 * 1e-2)


def test_only_beta_over_eps_turns_the_step() -> None:
    steps = []
    for factor in (1.0, 1e-3):
        model, _, opt, _ = small(beta=0.3 * factor, eps=0.01 * factor)
        steps.append(moved(model, opt) / factor)
    np.testing.assert_allclose(steps[0], steps[1], rtol=1e-7, atol=1e-10)


def test_beta_weighs_the_gradient_and_nothing_else() -> None:
    # Doubling the loss is doubling beta.
    model, _, opt, _ = small(beta=0.6, eps=0.01)
    expected = moved(model, opt)
    model, _, opt, _ = small(beta=0.3, eps=0.01)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.mul_(2)
    np.testing.assert_allclose(moved(model, opt), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_without_an_objective_the_path_does_not_stand_still(beta: float) -> None:
    case = build("mlp")
    anchors = AnchorBatch(case.model, case.inputs)
    opt = FIPOptimizer(case.model.parameters(), anchors, beta=beta, eps=0.05, solver=EXACT)
    start = oracle.flat(list(case.model.parameters()))
    steps = []
    for _ in range(20):
        steps.append(moved(case.model, opt))
        assert np.linalg.norm(steps[-1]) == pytest.approx(0.05, rel=1e-9)
    # Twenty steps of 0.05 go as straight as the function allows.
    assert np.linalg.norm(oracle.flat(list(case.model.parameters())) - start) > 0.5
    cosines = [a @ b / 0.05**2 for a, b in zip(steps, steps[1:], strict=False)]
    assert min(cosines) > 0.9
    assert anchors.drift() < 1e-4


@pytest.mark.parametrize("products", [1, 2, 4, 8])
@pytest.mark.parametrize("precondition", [None, "adam", "muon"])
def test_a_path_without_an_objective_does_not_turn_back_with_few_products(
    products: int, precondition: str | None
) -> None:
    # A step back to where the last one came from restores the function best, but the path would stand still.
    case = build("mlp")
    anchors = AnchorBatch(case.model, case.inputs)
    opt = FIPOptimizer(
        case.model.parameters(),
        anchors,
        eps=0.05,
        precondition=precondition,
        solver=Solver(products=products),
    )
    start = oracle.flat(list(case.model.parameters()))
    steps = [moved(case.model, opt) for _ in range(20)]
    assert np.linalg.norm(oracle.flat(list(case.model.parameters())) - start) > 0.3
    assert all(a @ b > 0 for a, b in zip(steps, steps[1:], strict=False))
    assert anchors.drift() < 0.5


def test_a_gradient_of_zero_moves_no_weight() -> None:
    model, _, opt, _ = small(beta=1.0, eps=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert np.linalg.norm(moved(model, opt)) == 0


def test_the_step_without_drift_correction_solves_the_uncorrected_equation() -> None:
    case = build("mlp")
    model = case.model
    anchors = AnchorBatch(model, case.inputs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert anchors.drift() > 1e-4
    opt = FIPOptimizer(
        model.parameters(), anchors, beta=0.5, eps=0.01, drift_correction=False, solver=EXACT
    )
    task_loss(model, case.inputs).backward()
    params = list(model.parameters())
    g = oracle.metric(oracle.jacobian(model, case.inputs, "logits", params))
    expected, _ = oracle.sphere_step(g, 0.5 * oracle.flat([p.grad for p in params]), 0.01)
    np.testing.assert_allclose(moved(model, opt), expected, rtol=1e-6, atol=1e-9)


def test_adaptive_products_reach_the_exact_solution_when_asked_to() -> None:
    model, _, opt, inputs = small(beta=0.5, eps=0.01)
    opt.solver = Solver(products="adaptive", max_products=200, tol=1e-14, radius=1e-6)
    params = list(model.parameters())
    g = oracle.metric(oracle.jacobian(model, inputs, "logits", params))
    expected, _ = oracle.sphere_step(g, 0.5 * oracle.flat([p.grad for p in params]), 0.01)
    v = moved(model, opt)
    # The full length exceeds the radius, so the step has the exact direction and is shortened.
    np.testing.assert_allclose(v / np.linalg.norm(v), expected / 0.01, atol=1e-6)
    assert opt.last_step is not None
    assert opt.last_step.output_change_predicted == pytest.approx(1e-6, rel=1e-9)


@pytest.mark.parametrize("products", [0, 3])
def test_a_fixed_number_of_products_is_kept_and_the_step_shortened_to_the_radius(products) -> None:
    model, anchors, opt, _ = small(beta=0.5, eps=0.01)
    opt.solver = Solver(products=products)
    full = moved(model, opt)
    assert opt.last_step is not None
    change = opt.last_step.output_change
    for share in (0.1, 1e-3):
        model, anchors, opt, _ = small(beta=0.5, eps=0.01)
        opt.solver = Solver(products=products, radius=share * change)
        short, info = moved(model, opt), opt.last_step
        assert info is not None
        np.testing.assert_allclose(
            short / np.linalg.norm(short), full / np.linalg.norm(full), atol=1e-9
        )
        assert info.iterations == products
        assert info.step_norm == pytest.approx(np.linalg.norm(short), rel=1e-9)
        # The output change is proportional to that of the full step, up to a small effect of curvature.
        assert info.output_change == pytest.approx(share * change, rel=0.05)
        assert info.output_change == pytest.approx(math.sqrt(anchors.drift()), rel=1e-9)


def test_adaptive_steps_take_no_products_while_the_outputs_stay_within_the_radius() -> None:
    model, anchors, opt, inputs = small(beta=0.5, eps=0.01)
    gradient = oracle.flat([p.grad for p in model.parameters()])
    first = -0.01 * gradient / np.linalg.norm(gradient)
    opt.solver = Solver(products="adaptive", radius=1e3)
    np.testing.assert_allclose(moved(model, opt), first, rtol=1e-9, atol=1e-14)
    info = opt.last_step
    assert info is not None
    assert (info.iterations, info.output_change_predicted) == (0, None)
    assert info.output_change == pytest.approx(math.sqrt(anchors.drift()), rel=1e-9)

    # With a radius just below the change of that step, the solver takes another step.
    model, _, opt, _ = small(beta=0.5, eps=0.01)
    opt.solver = Solver(products="adaptive", radius=0.99 * info.output_change)
    assert np.abs(moved(model, opt) - first).max() > 1e-6
    assert opt.last_step is not None
    assert opt.last_step.iterations > 0
    assert opt.last_step.output_change_predicted <= opt.solver.radius * (1 + 1e-9)
