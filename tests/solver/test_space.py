"""Vectors that are divided among ranks have the lengths, inner products and solutions of whole ones."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sphere_problems import diagonal, psd, vector

from fipoptim.ranks import Ranks
from fipoptim.solver.eigenvalues import largest_eigenvalues
from fipoptim.solver.first_order import first_order_step
from fipoptim.solver.restoring import RestoringSteps
from fipoptim.solver.space import WHOLE, Part, Space
from fipoptim.solver.sphere import solve_on_sphere

SHAPES = [torch.Size([7, 3]), torch.Size([1, 5]), torch.Size([4])]
SIZE = sum(shape.numel() for shape in SHAPES)


class Thread(Ranks):
    """One of two threads, which meet at each sum as ranks do."""

    def __init__(self, rank: int, barrier: threading.Barrier, told: list[Any]) -> None:
        self.rank, self.size = rank, 2
        self._barrier, self._all = barrier, told

    @property
    def alone(self) -> bool:
        return False

    def _both(self, value: Any) -> list[Any]:
        self._all[self.rank] = value
        self._barrier.wait(timeout=60)
        both = list(self._all)
        self._barrier.wait(timeout=60)
        return both

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        one, two = self._both(tensor.clone())
        return tensor.copy_(one + two)

    def sums(self, *numbers: float) -> list[float]:
        return [a + b for a, b in zip(*self._both(numbers), strict=True)]

    def largest(self, *numbers: float) -> list[float]:
        return [max(a, b) for a, b in zip(*self._both(numbers), strict=True)]

    def gathered_parts(self, part: torch.Tensor) -> list[torch.Tensor]:
        return self._both(part.clone())


def parts_of(rank: int, dim: int = 0) -> list[Part]:
    """The halves of each tensor, of which the second is shorter or empty."""
    parts = []
    for shape in SHAPES:
        along = min(dim, len(shape) - 1)
        half = math.ceil(shape[along] / 2)
        start = rank * half
        parts.append(Part(shape, along, start, min(half, shape[along] - start)))
    return parts


def cut(v: torch.Tensor, parts: list[Part]) -> torch.Tensor:
    whole = v.split([part.shape.numel() for part in parts])
    return torch.cat([p.of(x.view(p.shape)).reshape(-1) for p, x in zip(parts, whole, strict=True)])


def joined(both: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The whole vector of two parts."""
    result = []
    pieces = [
        v.split([p.of(torch.empty(p.shape)).numel() for p in parts_of(rank, dim)])
        for rank, v in enumerate(both)
    ]
    for k, shape in enumerate(SHAPES):
        whole = torch.empty(shape, dtype=both[0].dtype)
        for rank in (0, 1):
            part = parts_of(rank, dim)[k]
            view = part.of(whole)
            view.copy_(pieces[rank][k].view(view.shape))
        result.append(whole.reshape(-1))
    return torch.cat(result)


def on_two(work: Callable[[Space, Thread, list[Part]], Any], dim: int = 0) -> list[Any]:
    """What two ranks return that run ``work``."""
    barrier, told, found = threading.Barrier(2), [None, None], [None, None]
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        ranks = Thread(rank, barrier, told)
        parts = parts_of(rank, dim)
        try:
            found[rank] = work(Space(ranks, parts), ranks, parts)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return found


def matvec_of(g: torch.Tensor, ranks: Thread, parts: list[Part]) -> Callable[..., torch.Tensor]:
    def product(v: torch.Tensor) -> torch.Tensor:
        return cut(g @ joined(ranks.gathered_parts(v)), parts)

    return product


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *[(torch.float64, x) for x in (1.0, 1e300, 1e160, 1e-160, 1e-300)],
        *[(torch.float32, x) for x in (1.0, 1e38, 1e25, 1e-25, 1e-38)],
    ],
)
def test_lengths_and_inner_products_are_those_of_whole_vectors(dtype, scale, dim):
    v, w = (vector(SIZE, 1) / 5 * scale).to(dtype), vector(SIZE, 2).to(dtype)

    def work(space: Space, ranks: Thread, parts: list[Part]) -> Any:
        a, b = cut(v, parts), cut(w, parts)
        rows = torch.stack([b, a])
        return space.size(a), space.norm(a), space.unit(a), space.inner_products(rows, b).tolist()

    one, two = on_two(work, dim)
    assert one[0] == two[0] == WHOLE.size(v) == SIZE
    assert one[1] == two[1] == pytest.approx(WHOLE.norm(v), rel=1e-6)
    expected, length = WHOLE.unit(v)
    torch.testing.assert_close(joined([one[2][0], two[2][0]], dim), expected)
    assert one[2][1] == pytest.approx(length, rel=1e-6)
    assert one[3] == two[3]
    assert one[3] == pytest.approx(WHOLE.inner_products(torch.stack([w, v]), w).tolist(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_is_not_finite_on_every_rank_if_an_entry_of_one_is_not(bad):
    v = vector(SIZE, 1)
    v[0] = bad  # of rank 0
    found = on_two(lambda space, ranks, parts: space.norm(cut(v, parts)))
    assert all(not math.isfinite(x) for x in found)
    assert on_two(lambda space, ranks, parts: space.norm(torch.zeros(0))) == [0.0, 0.0]


@pytest.mark.parametrize("dim", [0, 1])
def test_random_vectors_are_those_of_one_process(dim):
    def work(space: Space, ranks: Thread, parts: list[Part]) -> Any:
        seeded = torch.Generator().manual_seed(3)
        like = torch.zeros(sum(p.of(torch.empty(p.shape)).numel() for p in parts))
        return [space.random(like, seeded) for _ in range(2)]

    one, two = on_two(work, dim)
    seeded = torch.Generator().manual_seed(3)
    for found in zip(one, two, strict=True):
        whole = torch.randn(SIZE, generator=seeded, dtype=torch.float64).float()
        assert torch.equal(joined(list(found), dim), whole)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 33, 2**16 + 15, 2**16 + 17, 2**17])
def test_normal_numbers_in_pieces_are_those_of_one_draw(n):
    """The parts of one rank are drawn one after the other, and no more than a part is held."""
    whole = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sizes = [n // 3, n // 3, n - 2 * (n // 3)]
    parts = [Part(torch.Size([size]), 0, 0, size) for size in sizes]
    space = Space(Thread(0, threading.Barrier(1), []), parts)
    found = space.random(torch.zeros(0, dtype=torch.float64), torch.Generator().manual_seed(1))
    assert torch.equal(found, whole)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("most", [3, 100])
@pytest.mark.parametrize("onward", [False, True])
def test_the_solution_of_eq_4_is_that_of_whole_vectors(onward, most, weighted):
    g, c = psd(SIZE, 12, 0), vector(SIZE, 1)
    if onward:
        c = torch.zeros(SIZE, dtype=torch.float64)
    ahead = vector(SIZE, 5)
    weight = vector(SIZE, 2).abs() + 0.1 if weighted else None

    def solved(space: Space, matvec: Any, of: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return solve_on_sphere(
            matvec,
            of(c),
            0.1,
            preconditioner=diagonal(None if weight is None else of(weight)),
            direction=lambda: of(ahead),
            max_products=most,
            tol=1e-12,
            onward=onward,
            space=space,
        )

    one, two = on_two(
        lambda space, ranks, parts: solved(
            space, matvec_of(g, ranks, parts), lambda v: cut(v, parts)
        )
    )
    whole = solved(WHOLE, lambda v: g @ v, lambda v: v)
    assert one.products == two.products == whole.products
    assert one.multiplier == two.multiplier == pytest.approx(whole.multiplier, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(joined([one.step, two.step]), whole.step, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 1e-40])
def test_first_order_steps_are_those_of_whole_vectors(scale):
    c, weight = vector(SIZE, 1) * scale, vector(SIZE, 2).abs() + 0.1

    def work(space: Space, ranks: Thread, parts: list[Part]) -> Any:
        return first_order_step(cut(c, parts), 0.1, diagonal(cut(weight, parts)), space=space)

    one, two = on_two(work)
    step, gain = first_order_step(c, 0.1, diagonal(weight))
    assert one[1] == two[1] == pytest.approx(gain)
    torch.testing.assert_close(joined([one[0], two[0]]), step)


def test_restoring_steps_are_those_of_whole_vectors():
    g, gradient = psd(SIZE, 12, 0), psd(SIZE, 12, 0) @ vector(SIZE, 1)

    def work(space: Space, ranks: Thread, parts: list[Part]) -> Any:
        steps = RestoringSteps(
            matvec_of(g, ranks, parts), cut(gradient, parts), 1.0, max_products=4, space=space
        )
        return steps.products, steps.step(steps.least_damping)

    one, two = on_two(work)
    whole = RestoringSteps(lambda v: g @ v, gradient, 1.0, max_products=4)
    assert one[0] == two[0] == whole.products == 4
    torch.testing.assert_close(joined([one[1], two[1]]), whole.step(whole.least_damping))


def test_eigenvalues_are_those_of_whole_vectors():
    g = psd(SIZE, 12, 0)

    def work(space: Space, ranks: Thread, parts: list[Part]) -> Any:
        like = cut(torch.zeros(SIZE, dtype=torch.float64), parts)
        matvec = matvec_of(g, ranks, parts)
        return largest_eigenvalues(matvec, like, 4, tol=1e-9, max_products=60, vectors=space)

    one, two = on_two(work)
    assert torch.equal(one, two)
    torch.testing.assert_close(one, torch.linalg.eigvalsh(g).flip(0)[:4])


def test_rows_of_a_part_are_counted_from_its_start():
    assert Part(torch.Size([7, 3]), 0, 4, 3).rows([0, 4, 6]) == [0, 2]
    assert Part(torch.Size([7, 3]), 0, 7, 0).rows([0, 4, 6]) == []
    assert Part(torch.Size([7, 3]), 1, 2, 1).rows([0, 6]) == [0, 6]
    number = torch.tensor(2.0)
    assert torch.equal(Part(number.shape, 0, 0, 0).of(number), number)
