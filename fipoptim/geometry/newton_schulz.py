"""Newton-Schulz iterations: the inverse root of a positive matrix, and so an orthogonal factor, by products alone."""

from __future__ import annotations

import torch
from torch import Tensor

# The coefficients and the number of the iterations are those of Muon (Jordan et al., 2024) and of torch.optim.Muon.
# Singular values are brought near 1, between 0.7 and 1.2, and smaller ones are multiplied by 485 at most.
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


def inverse_root_of_gram(gram: Tensor) -> Tensor:
    r"""A polynomial ``q`` of :math:`G = X X^\top`, such that :math:`q(G) X` is about the orthogonal factor of ``X``.

    An iteration takes ``X`` to :math:`p(G) X` with :math:`p(G) = a + b G + c G^2`. Here only ``G`` is multiplied, and
    ``q`` is the product of the factors. Each is positive for every ``G``, so :math:`q` is positive definite.

    Args:
        gram: ``G``, symmetric and positive, of trace 1 or zero, shape ``(n, n)``.

    Returns:
        ``q(G)``, shape ``(n, n)``.
    """
    product: Tensor | None = None
    for left in reversed(range(ITERATIONS)):
        factor = torch.addmm(gram, gram, gram, beta=CUBIC, alpha=QUINTIC)
        factor.diagonal().add_(LINEAR)
        product = factor if product is None else factor @ product
        if left:
            gram = factor @ (gram @ factor)
    assert product is not None
    return (product + product.mT).div_(2)  # symmetric in TF32, too
