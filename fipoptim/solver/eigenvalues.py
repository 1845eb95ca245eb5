"""The largest eigenvalues of a positive semi-definite operator, with multiplicity, from products alone."""

from __future__ import annotations

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
        elif found[1] < starts:
            return found[0]
        else:
            wanted = starts + 1
        if not grown and not space.exhausted and space.size < n:
            return None


def _converged(space: KrylovSpace, n: int, k: int, tol: float) -> tuple[Tensor, int] | None:
    """The ``k`` largest eigenvalues in the space, and the largest number of equal ones among all but the last.

    None if the eigenvalues have not converged.
    """
    if space.size == 0:
        return None
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(space.T))
    values = values[:k].clamp(min=0)
    largest = float(values[0])
    residuals = torch.tensor(
        [space.residual(vectors[:, j]) for j in range(len(values))], device="cpu"
    )
    if space.size == n:
        return values, 0
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
    return values, int(equal.max()) if len(equal) else 0
