"""Eq. 4 on the sphere from products alone, against the dense solution."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sphere_problems import SCALES, diagonal, psd, solve, vector

from fipoptim.solver.krylov import KrylovSpace
from fipoptim.solver.sphere import solve_on_sphere


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(2, 30),
    rank_share=st.floats(0, 1),
    log_beta=st.floats(-6, 6),
    log_scale=st.sampled_from([-8.0, 0.0, 8.0]),
    weighted=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_the_solution_is_the_dense_one(
    n: int, rank_share: float, log_beta: float, log_scale: float, weighted: bool, seed: int
) -> None:
    scale = 10.0**log_scale
    g = psd(n, round(rank_share * n), seed, scale)
    c = vector(n, seed + 1) * scale * 10.0**log_beta
    weight = vector(n, seed + 2).abs() + 0.1 if weighted else None
    solution = solve(g, c, 0.5, preconditioner=diagonal(weight))
    w = np.ones(n) if weight is None else weight.numpy()
    v = solution.step.numpy()
    assert math.sqrt(v @ (w * v)) == pytest.approx(0.5, rel=1e-12)
    expected, multiplier = oracle.sphere_step(
        g.numpy(), c.numpy(), 0.5, w, direction=vector(n, 99).numpy()
    )
    best = oracle.objective(g.numpy(), c.numpy(), expected)
    size = abs(expected @ g.numpy() @ expected) + abs(c.numpy() @ expected)
    assert oracle.objective(g.numpy(), c.numpy(), v) - best <= 1e-10 * size
    assert solution.change == pytest.approx(
        math.sqrt(max(v @ g.numpy() @ v, 0)), rel=1e-5, abs=1e-7 * scale**0.5
    )
    gradient = 2 * (g.numpy() @ v + solution.multiplier * w * v) + c.numpy()
    reference = np.linalg.norm(c.numpy() / np.sqrt(w))
    assert np.linalg.norm(gradient / np.sqrt(w)) <= 1e-8 * reference + 1e-8 * scale
    if multiplier > 1e-6 * scale:
        assert np.linalg.norm(v - expected) <= 1e-6 * np.linalg.norm(expected)
        assert solution.multiplier == pytest.approx(multiplier, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "what", ["b = 0", "g = 0", "both 0", "in range", "rank 1", "identity", "n = 1"]
)
def test_the_degenerate_cases_give_a_step_of_the_right_length(
    what: str, weighted: bool, dtype: torch.dtype, scale: float
) -> None:
    n = 1 if what == "n = 1" else 12
    g = psd(n, {"rank 1": 1, "n = 1": 1}.get(what, 5), 3, scale)
    c = scale * vector(n, 4)
    if what == "b = 0":
        c = torch.zeros(n)
    elif what == "g = 0":
        g = torch.zeros(n, n)
    elif what == "both 0":
        g, c = torch.zeros(n, n), torch.zeros(n)
    elif what == "in range":
        c = 1e-4 * g @ vector(n, 5)
    elif what == "identity":
        g = scale * torch.eye(n)
    g, c = g.to(dtype), c.to(dtype)
    weight = (vector(n, 6).abs() + 0.1).to(dtype) if weighted else None
    for length in (1e-8, 1.0, 1e8):
        for products in (1, 2, 3, 100):
            solution = solve_on_sphere(
                lambda v: g @ v, c, length, preconditioner=diagonal(weight),
                direction=lambda: vector(n, 7).to(dtype), max_products=products, tol=0.0,
            )  # fmt: skip
            v = solution.step.double()
            norm = float((v.square() * (1 if weight is None else weight.double())).sum().sqrt())
            assert norm == pytest.approx(length, rel=1e-5 if dtype == torch.float32 else 1e-10)
            assert math.isfinite(solution.multiplier)
            assert solution.products <= min(products, n)
            assert solution.residual is not None
            assert math.isfinite(solution.residual)


def test_the_hard_case_is_filled_from_the_null_space_in_the_given_direction() -> None:
    g = psd(10, 4, 0)
    c = 1e-3 * g @ vector(10, 1)
    direction = vector(10, 2)
    solution = solve(g, c, 1.0, direction=lambda: direction)
    pinv = torch.linalg.pinv(g, rtol=1e-9)
    null = direction - pinv @ (g @ direction)
    inside = -pinv @ c / 2
    fill = null / null.norm() * (1 - inside.norm() ** 2).sqrt()
    torch.testing.assert_close(solution.step, inside + fill, rtol=1e-7, atol=1e-9)
    assert abs(solution.multiplier) < 1e-9


def test_without_a_direction_the_step_may_end_inside_the_ball() -> None:
    g = psd(10, 4, 0)
    c = 1e-3 * g @ vector(10, 1)
    solution = solve(g, c, 1.0, direction=None)
    torch.testing.assert_close(
        solution.step, -torch.linalg.pinv(g, rtol=1e-9) @ c / 2, rtol=1e-7, atol=1e-10
    )
    assert solution.multiplier == 0
    boundary = solve(g, 1e6 * c, 1.0, direction=None)
    assert float(boundary.step.norm()) == pytest.approx(1.0, rel=1e-12)
    nothing = solve(g, torch.zeros(10, dtype=torch.float64), 1.0, direction=None)
    assert not nothing.step.any()
    assert nothing.products == 0


def test_full_rank_with_a_small_gradient_has_a_negative_multiplier() -> None:
    # More outputs than weights: the sphere cannot be filled from a null space.
    g = psd(8, 8, 0) + 0.1 * torch.eye(8, dtype=torch.float64)
    c = 1e-3 * vector(8, 1)
    solution = solve(g, c, 1.0)
    expected, multiplier = oracle.sphere_step(g.numpy(), c.numpy(), 1.0)
    assert multiplier < 0
    assert solution.multiplier == pytest.approx(multiplier, rel=1e-9)
    np.testing.assert_allclose(solution.step.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_more_products_never_make_the_objective_worse() -> None:
    g, c = psd(40, 25, 3), vector(40, 5) * 0.01
    values = []
    for products in range(1, 40):
        v = solve(g, c, 1.0, max_products=products).step
        values.append(float(v @ g @ v + c @ v))
    assert all(later <= earlier + 1e-12 for earlier, later in zip(values, values[1:], strict=False))


def test_products_are_counted_and_stop_on_convergence() -> None:
    g, c = psd(50, 6, 1), vector(50, 2)
    calls = 0

    def matvec(v: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return g @ v

    solution = solve_on_sphere(matvec, c, 0.1, direction=lambda: c, max_products=50, tol=0.0)
    assert calls == solution.products == 7  # six directions of the range, and one outside it
    calls = 0
    assert (
        solve_on_sphere(matvec, c, 0.1, direction=lambda: c, max_products=3).products == calls == 3
    )


def test_memory_for_many_products_is_allocated_only_as_needed() -> None:
    n = 2**22
    diagonal = torch.zeros(n)
    diagonal[:3] = torch.tensor([3.0, 2.0, 1.0])
    c = torch.zeros(n)
    c[:4] = 1.0
    # A million vectors of four million entries would be sixteen terabytes.
    solution = solve_on_sphere(
        lambda v: diagonal * v, c, 1.0, direction=lambda: c, max_products=10**6, tol=1e-6
    )
    assert solution.products <= 5
    g, c = psd(60, 60, 0), vector(60, 1)
    space = KrylovSpace(lambda v: g @ v, 60)  # more vectors than the first block of memory holds
    space.add_start(c)
    while space.extend():
        pass
    assert space.size == 60
    torch.testing.assert_close(
        torch.linalg.eigvalsh(space.T), torch.linalg.eigvalsh(g), rtol=0, atol=1e-12
    )


def test_the_solver_stops_early_if_accept_returns_true() -> None:
    g, c = psd(50, 20, 1), vector(50, 2)
    seen: list[float] = []

    def accept(change: float, multiplier: float) -> bool:
        seen.append(change)
        return len(seen) == 3

    assert solve(g, c, 0.1, accept=accept).products == 4


def test_a_gradient_or_product_that_is_not_finite_raises() -> None:
    g, c = psd(5, 3, 0), vector(5, 0)
    bad = c.clone()
    bad[2] = math.nan
    with pytest.raises(RuntimeError, match="not finite"):
        solve(g, bad, 1.0)
    with pytest.raises(RuntimeError, match="not finite"):
        solve_on_sphere(lambda v: v * math.inf, c, 1.0)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(6, 30), products=st.integers(2, 4), seed=st.integers(0, 10_000))
def test_a_restoring_term_alone_does_not_turn_the_step_back(
    n: int, products: int, seed: int
) -> None:
    g = psd(n, n - 2, seed)
    last = 0.5 * vector(n, seed + 1) / vector(n, seed + 1).norm()
    solution = solve(
        g,
        2 * g @ last,  # the gradient of the drift that the last step caused
        0.5,
        direction=lambda: last.clone(),
        max_products=products,
        onward=True,
    )
    v = solution.step
    assert float(v.norm()) == pytest.approx(0.5, rel=1e-12)
    back = -last
    assert float((v - back).norm()) > 1e-3
    assert float(v @ g @ v) <= float(torch.linalg.eigvalsh(g)[-1]) * 0.25 * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(
    # With so few products the space is not the whole one; otherwise the step would be exact.
    n=st.integers(24, 40),
    exponent=st.integers(-12, 0),
    small=st.integers(2, 4),
    products=st.integers(3, 8),
    seed=st.integers(0, 10_000),
)
def test_a_restoring_term_does_not_turn_the_step_back_if_rounding_hides_the_least_curvature(
    n: int, exponent: int, small: int, products: int, seed: int
) -> None:
    # The curvatures lie far apart: that of the last step is far below the float32 rounding of the largest.
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    eigenvalues = torch.logspace(-small, 4, n, dtype=torch.float64)
    eigenvalues[: n // 2] *= 10.0**exponent
    g = ((basis * eigenvalues) @ basis.T).float()
    last = basis[:, : n // 2] @ torch.randn(n // 2, dtype=torch.float64)
    last = (0.5 * last / last.norm()).float()
    v = solve(
        g,
        2 * g @ last,
        0.5,
        direction=lambda: last.clone(),
        max_products=products,
        onward=True,
    ).step
    assert float(v.norm()) == pytest.approx(0.5, rel=1e-5)
    # The step points back by less than about 0.71 of its length.
    assert float(v @ last) > -0.71 * 0.5**2


@given(n=st.integers(2, 20), seed=st.integers(0, 10_000))
def test_a_restoring_term_alone_is_solved_exactly_with_all_products(n: int, seed: int) -> None:
    g, c = psd(n, n // 2, seed), vector(n, seed + 1)
    expected = solve(g, g @ c, 0.5)
    found = solve(g, g @ c, 0.5, onward=True)

    # Null directions only fill up the length of the step, and may point anywhere.
    assert torch.allclose(g @ found.step, g @ expected.step, atol=1e-12)
    assert float(found.step.norm()) == pytest.approx(float(expected.step.norm()), rel=1e-12)
    if expected.multiplier > 1e-6:
        assert torch.allclose(found.step, expected.step, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("log_share", [-3, 0, 3])
def test_a_step_with_products_is_finite_if_its_gradient_is(
    dtype: torch.dtype, scale: float, weighted: bool, log_share: int
) -> None:
    c, weight = vector(20, 0).clamp(-3, 3), vector(20, 1).abs() + 0.1
    g = psd(20, 6, 2)
    # Only ratios matter, so g is scaled like c, unless that exceeds the range of its precision.
    factor = scale * 10.0**-log_share if 1e-30 < scale < 1e30 else 0.0
    geometry = diagonal(weight.to(dtype) if weighted else None)
    near = (g * factor).to(dtype)
    solution = solve_on_sphere(
        lambda v: near @ v, (c * scale).to(dtype), 0.3, preconditioner=geometry,
        direction=lambda: vector(20, 7).to(dtype), max_products=20, tol=0.0,
    )  # fmt: skip
    expected = solve(
        g * (factor / scale), c, 0.3, preconditioner=diagonal(weight if weighted else None)
    )
    torch.testing.assert_close(solution.step.double(), expected.step, rtol=0, atol=1e-4)
    assert solution.multiplier == pytest.approx(expected.multiplier * scale, rel=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    times=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    null=st.booleans(),
    log_c=st.integers(-6, 3),
    c_misses=st.sampled_from(["nothing", "the lowest", "all but one", "everything"]),
    direction_misses=st.sampled_from(["nothing", "the lowest", "all but one", "everything"]),
    onward=st.booleans(),
    seed=st.integers(0, 10_000),
)
@example(
    # The first products of the search do not reach down to the lowest eigenvalue.
    times=[1, 1, 3, 1], null=False, log_c=1, c_misses="all but one", direction_misses="all but one",
    onward=False, seed=1,
)  # fmt: skip
def test_the_solution_is_exact_if_eigenvalues_repeat(
    times: list[int],
    null: bool,
    log_c: int,
    c_misses: str,
    direction_misses: str,
    onward: bool,
    seed: int,
) -> None:
    """The linear term and the direction may both be orthogonal to the lowest eigenspace."""
    eigenvalues = np.repeat([0.0 if null and i == 0 else 0.5 + i for i in range(len(times))], times)
    n = len(eigenvalues)

    def with_parts(misses: str, seed: int) -> torch.Tensor:
        part = vector(n, seed)
        if misses == "everything":
            part[:] = 0.0
        if misses != "nothing":
            part[: times[0]] = 0.0
        if misses == "all but one":
            part[: n - times[-1]] = 0.0
        return part

    # The matrix is diagonal, so that a missing part is missing to the last digit.
    g = torch.diag(torch.from_numpy(eigenvalues))
    c = 10.0**log_c * with_parts(c_misses, seed)
    direction = with_parts(direction_misses, seed + 1)
    solution = solve(
        g, c, 0.5, direction=lambda: direction.clone(), max_products=4 * n, onward=onward
    )
    v = solution.step.numpy()
    assert np.linalg.norm(v) == pytest.approx(0.5, rel=1e-9)
    filling = vector(n, seed + 2).numpy()  # any direction will do
    expected, multiplier = oracle.sphere_step(g.numpy(), c.numpy(), 0.5, direction=filling)
    best = oracle.objective(g.numpy(), c.numpy(), expected)
    size = abs(expected @ g.numpy() @ expected) + abs(c.numpy() @ expected)
    assert oracle.objective(g.numpy(), c.numpy(), v) - best <= 1e-10 * max(size, 1.0)
    assert solution.multiplier == pytest.approx(multiplier, rel=1e-6, abs=1e-7)


def test_the_direction_fills_a_lowest_eigenspace_of_several_dimensions() -> None:
    eigenvalues = torch.tensor([0.5, 0.5, 0.5, 1.0, 1.0, 2.0], dtype=torch.float64)
    c = torch.tensor([0.0, 0.0, 0.0, 1e-2, -2e-2, 1e-2], dtype=torch.float64)
    direction = vector(6, 3)
    solution = solve(torch.diag(eigenvalues), c, 1.0, direction=lambda: direction.clone())
    inside = torch.where(c == 0, 0.0, -c / 2 / (eigenvalues - 0.5))
    fill = torch.where(c == 0, direction, 0.0)
    fill *= (1 - inside.norm() ** 2).sqrt() / fill.norm()
    torch.testing.assert_close(solution.step, inside + fill, rtol=0, atol=1e-9)
    assert solution.multiplier == pytest.approx(-0.5, rel=1e-9)
