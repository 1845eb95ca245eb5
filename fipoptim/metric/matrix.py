"""The matrix ``g`` itself, for small problems and for looking at it: dense, diagonal, largest eigenvalues."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from fipoptim.anchors.inputs import Inputs, map_inputs, named_tensors, split_inputs
from fipoptim.flat import FlatVectors
from fipoptim.mean import AnchorMean
from fipoptim.metric.compare import close
from fipoptim.metric.linearizer import Linearizer
from fipoptim.metric.point import Parameters
from fipoptim.solver.eigenvalues import largest_eigenvalues, largest_eigenvectors
from fipoptim.solver.space import Space

Product = Callable[[Tensor], Tensor]


def dense_matrix(matvec: Product, flat: FlatVectors) -> Tensor:
    """The matrix, shape ``(n, n)``, from n products.

    Args:
        matvec: The product with the matrix; vectors have shape ``(n,)``.
        flat: The layout of the vectors.

    Raises:
        ValueError: If the matrix would have more than 10^9 entries.
    """
    n = flat.size
    if n**2 > 10**9:
        raise ValueError(f"dense: the matrix of n = {n} weights does not fit; use matvec.")
    like = flat.zeros()
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    g = torch.stack([matvec(column) for column in eye])
    return (g + g.T) / 2


def exact_diagonal(
    linearizer: Linearizer, mean: AnchorMean, flat: FlatVectors, at_once: int | None
) -> Tensor:
    """The diagonal, shape ``(n,)``, from the gradient of each output of each anchor.

    Args:
        linearizer: The outputs.
        mean: The mean over the anchors.
        flat: The layout of vectors.
        at_once: The most anchors whose gradients are taken at once; None is all of them, as far as memory allows.

    Raises:
        ValueError: If the outputs of an anchor depend on the others, or if the model cannot be vectorized.
    """
    point, inputs, z = linearizer.point, linearizer.inputs, linearizer.outputs
    parameters, device = point.parameters, point.network.device
    total = flat.zeros()
    count, outputs = z.shape
    size = max(1, min(at_once or count, 2**26 // flat.size))

    def output_of(form: Inputs) -> Callable[[Parameters, tuple[Tensor, ...], int], Tensor]:
        """One output of one anchor, whose tensors are those of ``form``; vmap() takes no form but a tuple."""

        def output(parameters: Parameters, anchor: tuple[Tensor, ...], k: int) -> Tensor:
            values = iter(anchor)
            single = map_inputs(lambda _: next(values).unsqueeze(0), form)
            return point.function_on(single)(parameters)[0, k]

        return output

    with linearizer.evaluation(tangents=True):
        for part, expected in zip(split_inputs(inputs, size), z.split(size), strict=True):
            gradient = torch.func.vmap(
                torch.func.grad_and_value(output_of(part)), in_dims=(None, 0, None)
            )
            values = tuple(x.to(device) for x in named_tensors(part).values())
            for k in range(outputs):
                try:
                    rows, alone = gradient(parameters, values, k)
                except RuntimeError as error:
                    raise ValueError(
                        "probes: None takes the gradients of all anchors at once by torch.func.vmap, which this "
                        f"model does not allow ({str(error).strip().splitlines()[0]}); give a number of probes, "
                        "for instance probes=100."
                    ) from error
                if not close(alone, expected[:, k], 1e-3):
                    raise ValueError(
                        "probes: None takes the gradient of one anchor at a time, but the model's outputs for one "
                        "anchor depend on the others (batch norm without running statistics?); give a number of "
                        "probes, for instance probes=100."
                    )
                total += flat.flatten(rows[name].square().sum(dim=0) for name in point.names)
    return mean.weighted(mean.total(total))


def estimated_diagonal(
    vjp: Product,
    outputs: Tensor,
    mean: AnchorMean,
    flat: FlatVectors,
    probes: int,
    generator: Generator | None,
) -> Tensor:
    """An unbiased estimate of the diagonal, shape ``(n,)``, from pullbacks of random signs.

    Args:
        vjp: The pullback of cotangents ``(N, m)``.
        outputs: The outputs that this rank evaluates, shape ``(N, m)``.
        mean: The mean over the anchors.
        flat: The layout of vectors.
        probes: The number of pullbacks.
        generator: Draws the signs on the CPU; None is torch's own.

    Raises:
        ValueError: If ``probes`` is not positive.
    """
    if probes < 1:
        raise ValueError(f"probes: must be a positive number of pullbacks, got {probes!r}.")
    total = flat.zeros()
    own = mean.ranks.share(mean.count)
    for _ in range(probes):
        signs = torch.randint(2, (mean.count, outputs.shape[1]), generator=generator, device="cpu")
        row = vjp(signs[own].mul_(2).sub_(1).to(outputs.device, outputs.dtype))
        total.addcmul_(row, row)
    return mean.weighted(total / probes)


def largest_of_spectrum(
    matvec: Product,
    flat: FlatVectors,
    k: int,
    *,
    tol: float,
    max_products: int | None,
    space: Space,
) -> Tensor:
    """The ``k`` largest eigenvalues, descending, shape ``(k,)``, float64; arguments as :func:`leading_eigenvectors`."""
    limit = _most_products(k, space.size(flat.zeros()), max_products)
    values = largest_eigenvalues(
        matvec, flat.zeros(), k, tol=tol, max_products=limit, vectors=space
    )
    if values is None:
        raise _not_converged("spectrum", k, limit)
    return values


def leading_eigenvectors(
    matvec: Product,
    flat: FlatVectors,
    k: int,
    *,
    tol: float,
    max_products: int | None,
    space: Space,
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest eigenvalues, descending, shape ``(k,)``, float64, and their eigenvectors ``(k, n)``.

    Args:
        matvec: The product with the matrix; vectors have shape ``(n,)``.
        flat: The layout of the vectors.
        k: How many, from 1 to n.
        tol: The residual of each, relative to the largest.
        max_products: The most products to take; None is 50 (k + 1).
        space: The space of the vectors.

    Raises:
        ValueError: If ``k`` is not between 1 and n.
        RuntimeError: If the eigenvalues have not converged.
    """
    limit = _most_products(k, space.size(flat.zeros()), max_products)
    found = largest_eigenvectors(
        matvec, flat.zeros(), k, tol=tol, max_products=limit, vectors=space
    )
    if found is None:
        raise _not_converged("eigenvectors", k, limit)
    return found


def _most_products(k: int, n: int, max_products: int | None) -> int:
    if not 1 <= k <= n:
        raise ValueError(f"k: must be between 1 and n = {n}, got {k}.")
    return min(n, 50 * (k + 1) if max_products is None else max_products)


def _not_converged(what: str, k: int, limit: int) -> RuntimeError:
    return RuntimeError(
        f"{what}: {k} eigenvalues have not converged in {limit} products; raise max_products."
    )
