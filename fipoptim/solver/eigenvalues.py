"""The largest eigenvalues of a positive semi-definite operator and their eigenvectors, from products alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fipoptim.solver.krylov import KrylovSpace, MatVec
from fipoptim.solver.space import WHOLE, Space


def largest_eigenvalues(
    matvec: MatVec,
    like: Tensor,
    k: int,
    *,
    tol: float,
    max_products: int,
    vectors: Space = WHOLE,
) -> Tensor | None:
    r"""The ``k`` largest eigenvalues, descending, shape ``(k,)``, float64.

    The method is block Lanczos from random starts, all of which are followed equally far. The space of ``s`` starts
    shows an eigenvalue of multiplicity ``m`` :math:`\min(m, s)` times. Starts are added until there are more of them
    than equal eigenvalues.

    Args:
        matvec: The product with the operator; vectors have shape ``(n,)``. Its result is written to.
        like: A tensor of the vectors' size ``(n,)``, precision and device.
        k: Between 1 and n.
        tol: The residual of each eigenvalue, relative to the largest.
        max_products: The most products to take.
        vectors: The space of the vectors, which may be divided among ranks.

    Returns:
        The eigenvalues, or None if they have not converged.
    """
    found = _search(matvec, like, k, tol=tol, max_products=max_products, vectors=vectors)
    return None if found is None else found[1].values


def largest_eigenvectors(
    matvec: MatVec,
    like: Tensor,
    k: int,
    *,
    tol: float,
    max_products: int,
    vectors: Space = WHOLE,
) -> tuple[Tensor, Tensor] | None:
    """The ``k`` largest eigenvalues as :func:`largest_eigenvalues` finds them, and orthonormal eigenvectors.

    Returns:
        The eigenvalues, shape ``(k,)``, float64, and the eigenvectors as rows, shape ``(k, n)``; fewer if the operator
        has fewer eigenvalues other than 0. None if they have not converged.
    """
    found = _search(matvec, like, k, tol=tol, max_products=max_products, vectors=vectors)
    if found is None:
        return None
    space, pairs = found
    rows = [space.combine(h) for h in pairs.vectors.T]
    return pairs.values[: len(rows)], torch.stack(rows) if rows else like.new_zeros(0, len(like))


class _Pairs(NamedTuple):
    """Eigenvalues that have converged.

    Attributes:
        values: The eigenvalues, shape ``(k,)``.
        vectors: The eigenvectors of those that the space shows, as columns in its coordinates.
        equal: The largest number of equal ones among all but the last.
    """

    values: Tensor
    vectors: Tensor
    equal: int


def _search(
    matvec: MatVec, like: Tensor, k: int, *, tol: float, max_products: int, vectors: Space
) -> tuple[KrylovSpace, _Pairs] | None:
    """The Krylov space in which the eigenvalues have converged, and these; None if they have not."""
    n = vectors.size(like)
    space = KrylovSpace(matvec, min(n, max_products), space=vectors)
    seeded = torch.Generator("cpu").manual_seed(0)
    starts, wanted = 0, 1 if k == 1 else 2  # one start is enough for the largest eigenvalue
    while True:
        grown = True
        if starts < wanted:
            depth = space.size // max(starts, 1)
            space.add_start(vectors.random(like, seeded))
            starts += 1
            for _ in range(depth):
                grown = space.extend(newest=True)
        elif (found := _converged(space, n, k, tol)) is None:
            grown = space.extend()
            for _ in range(starts - 1):
                space.extend()
        elif found.equal < starts:
            return space, found
        else:
            wanted = starts + 1
        if not grown and not space.exhausted and space.size < n:
            return None


def _converged(space: KrylovSpace, n: int, k: int, tol: float) -> _Pairs | None:
    """The ``k`` largest eigenvalues in the space; None if they have not converged."""
    if space.size == 0:
        return None
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(space.T))
    values, vectors = values[:k].clamp(min=0), vectors[:, :k]
    largest = float(values[0])
    residuals = torch.tensor(
        [space.residual(vectors[:, j]) for j in range(len(values))], device="cpu"
    )
    if space.size == n:
        return _Pairs(values, vectors, 0)
    if not space.exhausted and (len(values) < k or bool((residuals > tol * largest).any())):
        return None
    # An eigenvalue that an exhausted space does not show is zero, or a further copy of one that it shows.
    values = torch.cat([values, values.new_zeros(k - len(values))])
    residuals = torch.cat([residuals, residuals.new_zeros(k - len(residuals))])
    noise = space.rounding * space.size
    # The last eigenvalue is not counted, as a further copy of it would not change the list.
    counted = values > values[-1] + noise + (0.0 if space.exhausted else tol * largest)
    values_counted, off = values[counted], residuals[counted] + noise
    apart = (values_counted[:, None] - values_counted).abs()
    equal = (apart <= off[:, None] + off).sum(dim=1)
    return _Pairs(values, vectors, int(equal.max()) if len(equal) else 0)
