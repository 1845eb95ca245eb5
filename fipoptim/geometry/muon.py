r"""Muon's geometry: the weights of a layer are measured as a matrix.

With ``C`` the linear term of a layer, :math:`P = (C C^\top)^{1/2} \otimes I`. The first-order step :math:`-P^{-1} c` is
then the orthogonal factor of ``C``, which moves all its singular directions alike (Muon; Jordan et al., 2024; Shampoo
without memory). The root comes from eigenvectors if the shorter side of ``C`` is short, and else from Newton-Schulz
iterations, as :class:`torch.optim.Muon` takes them. These reach it to within a factor of 0.7 to 1.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fipoptim.flat import matrix_shape
from fipoptim.geometry.base import Geometry
from fipoptim.geometry.blocks import BlockPreconditioner
from fipoptim.geometry.running_means import running_mean, running_squares
from fipoptim.geometry.sides import EigenSides, NewtonSides, Sides, on_rows
from fipoptim.solver.preconditioner import Preconditioner

# The RMS of Adam's step in units of its learning rate, for gradients that are noise and a momentum of 0.9. Orthogonal
# steps are made as long, so that both kinds of layers learn alike (Liu et al., "Muon is scalable for LLM training",
# 2025).
ADAM_RMS = 0.2
# The longest shorter side of a matrix whose eigenvectors are taken.
LONGEST_SIDE = 256


class Muon(Geometry):
    """``P`` is a matrix for the weights of a linear or convolutional layer; other parameters are as with ``"adam"``.

    As is the custom with Muon, so are the tables of embeddings, and a head whose shorter side is beyond 256
    (:func:`fipoptim.geometry.layers.other_than_matrices`). The ``matrix`` of a group says otherwise, and
    :func:`fipoptim.geometry.describe` tells which parameter is measured how.

    Momentum acts on the whole linear term, with Nesterov's look-ahead. The draw of anchors adds noise to the restoring
    term, and without the mean that noise would turn the orthogonal step, as the noise of the gradient would.
    """

    @classmethod
    def entries(cls, p: Tensor, matrix: bool | None) -> tuple[str, ...]:
        """See :class:`Geometry`."""
        return () if is_matrix(p) and matrix is not False else ("exp_avg_sq",)

    @classmethod
    def kind(cls, p: Tensor, matrix: bool | None) -> str:
        """See :class:`Geometry`."""
        return "squares" if cls.entries(p, matrix) else "matrix"

    def average(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradient as it is: :meth:`update` averages the whole linear term."""
        return gradients

    def update(self, linear: Tensor, size: float, *, objective: bool) -> Preconditioner:
        """See :class:`Geometry`."""
        parameters = self.parameters
        parts = parameters.flat.unflatten(linear)
        by_squares = [
            k
            for k, (p, matrix) in enumerate(zip(parameters.tensors, parameters.matrix, strict=True))
            if self.entries(p, matrix)
        ]
        means: list[Tensor] = []
        unit = 1.0
        if by_squares:
            means, unit = running_squares(
                [parts[k] for k in by_squares], by_squares, size, self.memory
            )
        if objective:
            self._look_ahead(linear, parts)
        squares = dict(zip(by_squares, means, strict=True))
        measured = parameters.flat.views(linear if unit == 1.0 else linear / unit)
        matrices = {k: c for k, c in enumerate(measured) if k not in squares}
        shapes = [p.shape for p in parameters.tensors]
        return BlockPreconditioner(
            shapes,
            squares,
            orthogonalizing(matrices),
            linear,
            parameters.stretch,
            frozen=parameters.zeros,
        )

    def _look_ahead(self, linear: Tensor, parts: list[Tensor]) -> None:
        """Replace the linear term by what its running mean would be if the same term came again."""
        means = running_mean(parts, self.parameters.momentum, self.memory)
        if means is not None:
            views = self.parameters.flat.views(linear)
            torch._foreach_lerp_(
                views, [mean.to(linear) for mean in means], self.parameters.momentum
            )


def is_matrix(weights: Tensor) -> bool:
    """Whether a tensor of weights is a matrix: both of its sides are longer than 1."""
    return weights.dim() >= 2 and min(matrix_shape(weights.shape)) > 1


def orthogonalizing(linears: Mapping[int, Tensor]) -> list[Sides]:
    r"""P of matrices of weights, :math:`(C C^\top / \text{columns})^{1/2}` on the shorter side of each.

    Its diagonal is in the units of ``c``, as is that of Adam's geometry, the root of the mean of :math:`c^2`.

    Args:
        linears: The linear term ``C`` of each block that is a matrix, by the block's number.
    """
    # Sides of one length are decomposed, and multiplied, together.
    of_one_length: dict[int, list[int]] = {}
    for k, linear in linears.items():
        of_one_length.setdefault(min(matrix_shape(linear.shape)), []).append(k)
    return [
        _decomposed(members, [linears[k] for k in members])
        if side <= LONGEST_SIDE
        else NewtonSides.of(members, [linears[k] for k in members], ADAM_RMS)
        for side, members in of_one_length.items()
    ]


def _decomposed(members: list[int], linears: list[Tensor]) -> Sides:
    stacked = torch.stack([_gram(linear, 1.0) for linear in linears])
    # LAPACK decomposes them, on the CPU: cuSOLVER takes longer for a few matrices of this size, and much longer on a
    # GPU that is shared.
    grams = stacked.cpu()
    # The square of an entry of C beyond 1e150, or below the inverse of that, is outside the range of float64.
    squares = grams.diagonal(dim1=1, dim2=2).sum(dim=1)
    scales = [1.0] * len(linears)
    for k in torch.nonzero(~((squares > 1e-250) & (squares < torch.inf))).flatten().tolist():
        largest = float(linears[k].abs().max()) if linears[k].numel() else 0.0
        if largest > 0:
            scales[k] = largest
            grams[k] = _gram(linears[k], largest).cpu()
    values, vectors = (t.to(stacked.device) for t in torch.linalg.eigh(grams))
    torch._foreach_div_(
        list(values.clamp_min_(0)), [float(max(matrix_shape(c.shape))) for c in linears]
    )
    roots = values.sqrt_().div_(ADAM_RMS)
    torch._foreach_mul_(list(roots), scales)
    return EigenSides(members, roots, vectors, linears[0])


def _gram(linear: Tensor, scale: float) -> Tensor:
    """:math:`C C^T` on the shorter side of a matrix of weights, for ``C = linear / scale``, in float64."""
    c = linear.reshape(matrix_shape(linear.shape)).double()
    if scale != 1.0:
        c = c / scale
    return c @ c.T if on_rows(linear.shape) else c.T @ c
