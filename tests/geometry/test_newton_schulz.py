"""Muon's geometry of matrices whose shorter side is beyond 256: against the SVD, torch.optim.Muon and Eq. 4."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import oracle
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer, Solver
from fipoptim.geometry import muon
from fipoptim.geometry.blocks import BlockPreconditioner
from fipoptim.geometry.muon import orthogonalizing
from fipoptim.geometry.sides import NewtonSides

LONG = [(260, 400), (400, 260), (280, 280)]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def short_sides_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that are small enough for a dense solution are taken by Newton-Schulz iterations."""
    monkeypatch.setattr(muon, "LONGEST_SIDE", 1)


def alone(c: Tensor) -> BlockPreconditioner:
    return BlockPreconditioner([c.shape], {}, orthogonalizing({0: c}), c)


def on_shorter_side(side: np.ndarray, v: Tensor) -> np.ndarray:
    return side @ v.numpy() if len(v) <= len(v.T) else v.numpy() @ side


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("stretch", [None, (8.0, 1.0)])
def test_p_its_inverse_and_its_root_are_those_of_the_dense_matrix(
    shape: tuple[int, int], stretch: tuple[float, float] | None, short_sides_are_long: None
) -> None:
    c, biases = gaussian(*shape), gaussian(3, seed=1)
    size = c.numel() + 3
    sides = orthogonalizing({0: c})
    assert isinstance(sides[0], NewtonSides)
    geometry = BlockPreconditioner([c.shape, biases.shape], {1: biases.square()}, sides, c, stretch)
    matrix, mean = oracle.of_long_matrix(c.numpy())
    expected = scipy.linalg.block_diag(matrix, np.diag(biases.abs().numpy()))
    mean = (mean * c.numel() + float(biases.abs().sum())) / size
    factor = np.repeat(stretch or (1.0, 1.0), (c.numel(), 3))
    expected = oracle.damped(expected, mean) * np.outer(factor, factor)
    identity = torch.eye(size, dtype=torch.float64)
    inverse = torch.stack([geometry.inverse(v) for v in identity]).numpy().T
    np.testing.assert_allclose(inverse @ expected, np.eye(size), atol=1e-10)
    root = torch.stack([geometry.root(v) for v in identity]).numpy().T
    np.testing.assert_allclose(root.T @ root, expected, atol=1e-10 * expected.max())
    inverse_root = torch.stack([geometry.inverse_root(v) for v in identity]).numpy().T
    np.testing.assert_allclose(inverse_root @ root, np.eye(size), atol=1e-11)
    transposed = torch.stack([geometry.transposed_inverse_root(v) for v in identity]).numpy().T
    np.testing.assert_allclose(transposed, inverse_root.T, atol=1e-14)


@pytest.mark.parametrize("shape", LONG)
@pytest.mark.parametrize("kind", ["full", "low rank", "a row of zeros", "decaying"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_of_a_long_matrix_is_that_of_the_dense_side(
    shape: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    c = gaussian(*shape, dtype=dtype)
    if kind == "low rank":
        c = gaussian(shape[0], 2, dtype=dtype) @ gaussian(2, shape[1], seed=1, dtype=dtype)
    elif kind == "a row of zeros":
        c[3] = 0.0
    elif kind == "decaying":
        c *= torch.logspace(0, -12, shape[0], dtype=dtype)[:, None]
    side, mean = oracle.side_of_long_matrix(c.double().numpy())
    v = gaussian(*shape, seed=2)
    expected = on_shorter_side(np.linalg.inv(oracle.damped(side, mean)), v)
    found = alone(c).inverse(v.to(dtype).flatten()).double().view(shape).numpy()
    tolerance = 1e-8 if dtype == torch.float64 else 2e-3
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1e30, 1e38])
def test_p_of_a_long_matrix_of_very_large_or_small_terms_depends_only_on_their_ratios(
    scale: float,
) -> None:
    c, v = gaussian(260, 300).clamp(-3, 3), gaussian(260 * 300, seed=1).float()
    near = (c * scale).float()
    exactly = near.double() / scale if scale else near.double()
    found, expected = alone(near), alone(exactly)
    if scale == 0:
        assert torch.equal(found.inverse(v), v)
    for name in ("inverse", "inverse_root", "transposed_inverse_root", "root"):
        close = getattr(found, name)(v).double()
        torch.testing.assert_close(close, getattr(expected, name)(v.double()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_of_a_long_matrix_may_leave_the_range_of_float64(scale: float) -> None:
    c, v = gaussian(260, 300), gaussian(260 * 300, seed=1)
    torch.testing.assert_close(alone(c * scale).inverse(v), alone(c).inverse(v))


def test_a_dead_matrix_beside_a_living_one_has_the_damping_alone() -> None:
    c, dead = gaussian(300, 260), torch.zeros(260, 300, dtype=torch.float64)
    sides = orthogonalizing({0: c, 1: dead})
    geometry = BlockPreconditioner([c.shape, dead.shape], {}, sides, c)
    v = gaussian(2 * c.numel(), seed=1)
    _, found = geometry.inverse(v).chunk(2)
    torch.testing.assert_close(found, v.chunk(2)[1] * 101)


def network(
    shape: tuple[int, int], dtype: torch.dtype = torch.float64
) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    return model, gaussian(20, shape[1], seed=1, dtype=dtype), gaussian(20, shape[0], seed=2)


@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_a_step_without_products_has_the_direction_of_torchs_muon(shape: tuple[int, int]) -> None:
    moved = []
    for ours in (True, False):
        model, _, _ = network(shape, torch.float32)
        start = model.weight.detach().clone()
        optimizer: torch.optim.Optimizer
        if ours:
            anchors = AnchorBatch(model, gaussian(3, shape[1], dtype=torch.float32))
            group = {"params": model.parameters(), "matrix": True}
            optimizer = FIPOptimizer(
                [group], anchors, eps=0.1, precondition="muon", solver=Solver(products=0)
            )
        else:
            optimizer = torch.optim.Muon(model.parameters(), lr=0.1, weight_decay=0.0)
        model.weight.grad = gaussian(*shape, seed=3).float()
        optimizer.step()
        moved.append(model.weight.detach() - start)
    v, theirs = moved
    assert float((v * theirs).sum() / v.norm() / theirs.norm()) > 0.998  # theirs is in bfloat16
    # Every singular direction moves alike, to within the tolerance of the iterations.
    values = torch.linalg.svdvals(v.double())
    assert float(values.max() / values.min()) < 2.0


def deep() -> tuple[nn.Module, AnchorBatch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 260), nn.Tanh(), nn.Linear(260, 260), nn.Linear(260, 2))
    model = model.double()
    return model, AnchorBatch(model, gaussian(3, 3))


def train(model: nn.Module, opt: FIPOptimizer, steps: int = 1) -> None:
    for i in range(steps):
        opt.zero_grad()
        model(gaussian(4, 3, seed=10 + i)).square().sum().backward()
        opt.step()


@pytest.mark.parametrize("products", [100, "adaptive"])
def test_a_step_with_products_solves_eq_4_in_the_norm_of_the_dense_side(
    products: int | str,
) -> None:
    model, anchors = deep()
    anchors.reference.add_(0.1)  # there is a drift to correct
    radius = 0.01 if products == "adaptive" else None
    solver = Solver(products=products, tol=1e-13, max_products=100, radius=radius)
    opt = FIPOptimizer(model.parameters(), anchors, eps=0.3, precondition="muon", solver=solver)
    twin = AnchorBatch(copy.deepcopy(model), anchors.inputs)
    metric = AnchorMetric(twin)
    model(gaussian(4, 3)).square().sum().backward()
    b = metric.flatten([p.grad for p in model.parameters() if p.grad is not None])
    c = b + 2 / 3 * metric.vjp(metric.outputs - anchors.reference)
    sides, total = [], 0.0
    for term in metric.unflatten(c):
        if term.dim() == 1:
            sides.append((np.diag(term.abs().numpy()), float(term.abs().sum())))
            total += sides[-1][1]
        elif min(term.shape) > 256:
            side, mean = oracle.side_of_long_matrix(term.numpy())
            sides.append((side, mean))
            total += mean * term.numel()
        else:
            u, s, _ = np.linalg.svd(term.numpy() if len(term) <= len(term.T) else term.numpy().T)
            sides.append((5 * (u * s) @ u.T / max(term.shape) ** 0.5, 0.0))
            total += float(np.trace(sides[-1][0])) * max(term.shape)
    start = metric.flatten(model.parameters()).clone()
    opt.step()
    v = metric.flatten(model.parameters()) - start
    info = opt.last_step
    assert info is not None
    assert info.iterations > 3
    pv = []
    for (side, _), part in zip(sides, metric.unflatten(v), strict=True):
        dense = oracle.damped(side, total / len(v))
        two = part[:, None] if part.dim() == 1 else part
        product = dense @ two.numpy() if len(dense) == len(two) else two.numpy() @ dense
        pv.append(torch.as_tensor(product).reshape(part.shape))
    norm = metric.flatten(pv)
    if products == 100:
        assert float(v @ norm) == pytest.approx(0.3**2, rel=1e-7)
        kkt = 2 * (metric.matvec(v) + info.multiplier * norm) + c
        assert float(kkt.norm()) < 1e-6 * float(c.norm())
    else:
        assert info.output_change_predicted == pytest.approx(0.01, rel=1e-6)


def count(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """The sides of the matrices that a function of torch.linalg decomposes from now on."""
    sides: list[int] = []
    whole = getattr(torch.linalg, name)

    def counted(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        sides.append(matrix.shape[-1])
        return whole(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, name, counted)
    return sides


def test_a_long_side_is_never_decomposed_into_eigenvectors_and_has_a_root_only_for_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, anchors = deep()
    opt = FIPOptimizer(model.parameters(), anchors, eps=0.1, precondition="muon")
    train(model, opt)
    eigenvectors, roots = count(monkeypatch, "eigh"), count(monkeypatch, "cholesky")
    opt.solver = Solver(products=0)
    train(model, opt)
    assert (sorted(eigenvectors), roots) == ([2, 3], [])
    opt.solver = Solver(products=3)
    train(model, opt)
    assert max(eigenvectors) < 256
    assert roots == [260]


@pytest.mark.parametrize("products", [0, 3])
def test_the_entries_of_the_state_are_the_same_after_every_step(products: int) -> None:
    model, anchors = deep()
    solver = Solver(products=products)
    opt = FIPOptimizer(
        model.parameters(), anchors, eps=0.1, momentum=0.9, precondition="muon", solver=solver
    )
    kept = []
    for _ in range(3):
        train(model, opt)
        kept.append({k: sorted(entries) for k, entries in opt.state_dict()["state"].items()})
    assert kept[0] == kept[1] == kept[2]
    assert kept[0][2] == ["exp_avg", "exp_avg_weight", "step", "velocity"]
    assert "exp_avg_sq" in kept[0][3]
