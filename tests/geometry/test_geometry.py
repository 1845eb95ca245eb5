"""The geometries of the step: P against its roots, and Muon's geometry against the SVD and torch."""

from __future__ import annotations

import math
import warnings

import numpy as np
import oracle
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.flat import matrix_shape
from fipoptim.geometry.blocks import BlockPreconditioner as Layers
from fipoptim.geometry.muon import is_matrix, orthogonalizing


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    log_scale=st.integers(-12, 12),
    stretch=st.sampled_from([None, (1.0, 8.0)]),
    seed=st.integers(0, 1000),
)
def test_root_inverse_root_and_inverse_belong_to_the_same_matrix_p(
    rows: int, columns: int, log_scale: int, stretch: tuple[float, float] | None, seed: int
) -> None:
    c, biases = gaussian(rows, columns, seed=seed) * 10.0**log_scale, gaussian(3, seed=seed + 1)
    size = c.numel() + 3
    sides = orthogonalizing({0: c})
    geometry = Layers([c.shape, biases.shape], {1: biases.square()}, sides, c, stretch)
    identity = torch.eye(size, dtype=torch.float64)
    root = torch.stack([geometry.root(v) for v in identity]).numpy()
    inverse = torch.stack([geometry.inverse_root(v) for v in identity]).numpy()
    np.testing.assert_allclose(root, root.T, rtol=1e-12, atol=1e-12 * np.abs(root).max())
    np.testing.assert_allclose(root @ inverse, np.eye(size), atol=1e-9)
    expected = scipy.linalg.block_diag(oracle.of_matrix(c.numpy()), np.diag(biases.abs().numpy()))
    factor = np.repeat(stretch or (1.0, 1.0), (c.numel(), 3))
    expected = oracle.damped(expected) * np.outer(factor, factor)
    np.testing.assert_allclose(root @ root, expected, rtol=1e-6, atol=1e-6 * expected.max())
    squared = torch.stack([geometry.inverse(v) for v in identity]).numpy()
    np.testing.assert_allclose(squared, inverse @ inverse, atol=1e-9 * np.abs(squared).max())


def test_damping_is_as_precise_as_the_weights() -> None:
    squares = gaussian(5, seed=0).square()
    geometry = Layers([squares.shape], {0: squares}, [], squares)
    expected = oracle.damped(np.diag(squares.sqrt().numpy())).diagonal()
    ones = torch.ones(5, dtype=torch.float64)
    np.testing.assert_allclose(geometry.inverse(ones).numpy(), 1 / expected, rtol=1e-14)
    np.testing.assert_allclose(geometry.root(ones).numpy(), np.sqrt(expected), rtol=1e-14)


def test_a_geometry_can_write_its_result_over_its_input() -> None:
    c = gaussian(3, 4, seed=0)
    geometry = Layers([c.shape], {}, orthogonalizing({0: c}), c)
    v = gaussian(12, seed=1)
    expected = geometry.inverse_root(v)
    assert geometry.inverse_root(v, out=v) is v
    assert torch.equal(v, expected)


def test_a_geometry_without_a_linear_term_is_euclidean() -> None:
    c, biases = torch.zeros(2, 3), torch.zeros(2)
    geometry = Layers([c.shape, biases.shape], {1: biases}, orthogonalizing({0: c}), c)
    v = torch.arange(8.0)
    torch.testing.assert_close(geometry.root(v), v)
    torch.testing.assert_close(geometry.inverse_root(v), v)


@pytest.mark.parametrize(
    "shape", [(), (0,), (3,), (0, 6), (6, 0), (0, 0), (1, 6), (6, 1), (4, 0, 2), (4, 3, 0), (1, 1)]
)
def test_a_tensor_without_two_sides_longer_than_one_is_not_a_matrix(shape: tuple[int, ...]) -> None:
    weights = torch.ones(shape)
    assert not is_matrix(weights)
    if len(shape) >= 2:
        rows, columns = matrix_shape(weights.shape)
        assert (rows, columns) == (shape[0], math.prod(shape[1:]))
    alone = Layers([weights.shape], {0: weights}, [], weights)
    v = torch.arange(float(weights.numel()))
    for product in (alone.root(v), alone.inverse_root(v), alone.inverse(v)):
        torch.testing.assert_close(product, v)


@pytest.mark.parametrize("shape", [(0, 6), (6, 0), (3, 0, 2)])
@pytest.mark.parametrize("as_matrix", [False, True])
def test_an_empty_tensor_beside_others_changes_nothing(
    shape: tuple[int, ...], as_matrix: bool
) -> None:
    c, biases, empty = gaussian(3, 4, seed=0), gaussian(3, seed=1), gaussian(*shape, seed=2)
    expected = Layers([c.shape, biases.shape], {1: biases.square()}, orthogonalizing({0: c}), c)
    geometry = Layers(
        [c.shape, empty.shape, biases.shape],
        {2: biases.square()} | ({} if as_matrix else {1: empty}),
        orthogonalizing({0: c} | ({1: empty} if as_matrix else {})),
        c,
    )
    v = gaussian(15, seed=3)
    torch.testing.assert_close(geometry.root(v), expected.root(v))
    torch.testing.assert_close(geometry.inverse_root(v), expected.inverse_root(v))
    torch.testing.assert_close(geometry.inverse(v), expected.inverse(v))


class Wide(nn.Module):
    """A layer with an empty side, as pruning or a width of zero leaves it, a scalar and an ordinary layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that there is nothing to initialise
            self.empty = nn.Linear(inputs, outputs)
        self.scale, self.full = nn.Parameter(torch.ones(())), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        side = self.empty(x[:, : self.empty.in_features]).sum(dim=1, keepdim=True)
        return self.scale * self.full(x) + side


@pytest.mark.parametrize("precondition", [None, "adam", "muon"])
@pytest.mark.parametrize("products", [0, 4])
@pytest.mark.parametrize(("inputs", "outputs"), [(6, 0), (0, 6), (0, 0)])
def test_a_network_with_an_empty_layer_takes_the_step_of_the_others(
    inputs: int, outputs: int, products: int, precondition: str | None
) -> None:
    torch.manual_seed(0)
    model = Wide(inputs, outputs)
    anchors = AnchorBatch(model, torch.randn(5, 6))
    optimizer = FIPOptimizer(
        model.parameters(),
        anchors,
        eps=0.1,
        precondition=precondition,
        momentum=0.9,
        solver=Solver(products=products),
    )
    for _ in range(3):
        start = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        moved = [(p.detach() - s).flatten() for p, s in zip(model.parameters(), start, strict=True)]
        assert optimizer.last_step is not None
        assert float(torch.cat(moved).norm()) == pytest.approx(optimizer.last_step.step_norm, 1e-4)
        assert float(torch.cat(moved).norm()) > 0.01


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e160, 1e200])
@pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
def test_matrices_whose_squares_overflow_or_vanish_are_decomposed(
    shape: tuple[int, int], scale: float
) -> None:
    c, dead = gaussian(*shape, seed=0), torch.zeros(*shape, dtype=torch.float64)
    (expected,) = orthogonalizing({0: c, 1: dead, 2: c})
    (found,) = orthogonalizing({0: c * scale, 1: dead, 2: c})
    factors = torch.tensor([[scale], [1.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(found.values / factors, expected.values)
    torch.testing.assert_close(found.vectors.abs(), expected.vectors.abs())


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e25, 1e38])
def test_a_geometry_of_very_large_or_small_terms_depends_only_on_their_ratios(scale: float) -> None:
    c, biases = gaussian(3, 4, seed=0).clamp(-3, 3), gaussian(2, seed=1)
    near = (c * scale).float()
    shapes = [c.shape, biases.shape]
    geometry = Layers(shapes, {1: torch.zeros(2)}, orthogonalizing({0: near}), near)
    exactly = near.double() / scale
    expected = Layers(shapes, {1: torch.zeros(2).double()}, orthogonalizing({0: exactly}), exactly)
    v = gaussian(14, seed=3)
    for name in ("root", "inverse_root", "inverse"):
        close = getattr(geometry, name)(v.float()).double()
        torch.testing.assert_close(close, getattr(expected, name)(v), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_a_muon_step_without_products_is_orthogonal_like_a_step_of_torchs_muon(
    shape: tuple[int, int],
) -> None:
    def network() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(shape[1], shape[0], bias=False)

    x = torch.randn(20, shape[1], generator=torch.Generator().manual_seed(1))
    moved = []
    for ours in (True, False):
        model = network()
        start = model.weight.detach().clone()
        optimizer: torch.optim.Optimizer
        if ours:
            anchors = AnchorBatch(model, x[:3])
            optimizer = FIPOptimizer(
                model.parameters(), anchors, eps=0.1, precondition="muon", solver=Solver(products=0)
            )
        else:
            optimizer = torch.optim.Muon(model.parameters(), lr=0.1, weight_decay=0.0)
        model(x).square().sum().backward()
        gradient = model.weight.grad
        assert gradient is not None
        optimizer.step()
        moved.append((model.weight.detach() - start, gradient.clone()))
    (v, gradient), (theirs, _) = moved
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    polar = -u @ vt
    # Damping leaves small singular directions a little behind.
    assert float((v * polar).sum() / v.norm() / polar.norm()) > 0.995
    assert float((v * theirs).sum() / v.norm() / theirs.norm()) > 0.95


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_several_steps_are_those_worked_out_by_hand(momentum: float) -> None:
    """All of c has Nesterov momentum. P of a matrix comes from that mean, P of a bias from the mean of c squared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(8, 4).double(), torch.randn(8, 3).double()
    inputs = torch.randn(6, 4).double()
    anchors = AnchorBatch(model, inputs)
    beta, eps = 3.0, 0.2
    optimizer = FIPOptimizer(
        model.parameters(),
        anchors,
        beta=beta,
        eps=eps,
        momentum=momentum,
        precondition="muon",
        solver=Solver(products=0),
    )
    params = list(model.parameters())
    means = [torch.zeros_like(p) for p in params]
    squares = [torch.zeros_like(p) for p in params]
    for step in range(1, 5):
        drift = (model(inputs) - anchors.reference).square().sum(dim=1).mean()
        loss = beta * (model(x) - y).square().mean() + drift
        blocks, terms = [], []
        for p, c, mean, square in zip(
            params, torch.autograd.grad(loss, params), means, squares, strict=True
        ):
            mean.mul_(momentum).add_(c, alpha=1 - momentum)
            square.mul_(0.999).addcmul_(c, c, value=1 - 0.999)
            term = momentum * mean / (1 - momentum**step) + (1 - momentum) * c
            terms.append(term.flatten())
            root = (square / (1 - 0.999**step)).sqrt()
            blocks.append(oracle.of_matrix(term.numpy()) if p.dim() == 2 else np.diag(root.numpy()))
        c = torch.cat(terms).numpy()
        geometry = oracle.damped(scipy.linalg.block_diag(*blocks))
        direction = np.linalg.solve(geometry, c)
        expected = -eps * direction / np.sqrt(c @ direction)
        before = torch.cat([p.detach().flatten().clone() for p in params])
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        now = torch.cat([p.detach().flatten() for p in params])
        np.testing.assert_allclose((now - before).numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precondition", [None, "adam", "muon"])
def test_the_running_mean_of_a_dead_unit_becomes_zero_and_not_subnormal(
    precondition: str | None,
) -> None:
    """A CPU computes many times slower with subnormal numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias[0] = 10.0  # alive at first
    x, anchors = torch.randn(8, 3), AnchorBatch(model, torch.randn(5, 3))
    optimizer = FIPOptimizer(
        model.parameters(), anchors, eps=1e-3, momentum=0.5, precondition=precondition
    )
    for step in range(200):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step == 0:
            assert optimizer.state[model[0].weight]["exp_avg"][0].any()
            with torch.no_grad():
                model[0].bias[0] = -1e6
        for state in optimizer.state.values():
            size = state["exp_avg"].abs()
            assert not ((size > 0) & (size < torch.finfo(size.dtype).tiny)).any()
    assert not optimizer.state[model[0].weight]["exp_avg"][0].any()


@pytest.mark.parametrize("precondition", ["adam", "muon"])
def test_convolutions_in_channels_last_take_the_same_step(precondition: str) -> None:
    """One layer is beyond 256; running means have the memory layout of their weight."""

    def moved(memory_format: torch.memory_format) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 40, 2), nn.ReLU(), nn.Conv2d(40, 260, 3), nn.Flatten())
        model = model.double().to(memory_format=memory_format)
        inputs, x = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
        optimizer = FIPOptimizer(
            model.parameters(),
            AnchorBatch(model, inputs),
            eps=0.1,
            momentum=0.9,
            precondition=precondition,
        )
        start = [p.detach().clone() for p in model.parameters()]
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return torch.cat(
            [(p.detach() - s).flatten() for p, s in zip(model.parameters(), start, strict=True)]
        )

    torch.testing.assert_close(moved(torch.channels_last), moved(torch.contiguous_format))
