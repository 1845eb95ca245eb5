r"""The products that the solver needs of the norm :math:`\|v\|_P`, in which the length of a step is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Preconditioner(ABC):
    r"""A symmetric positive definite matrix :math:`P`, given by its products.

    In the coordinates :math:`y = R v`, with a root R of :math:`P = R^\top R`, the ball :math:`\|v\|_P = \varepsilon`
    is Euclidean. The symmetric root :math:`P^{1/2}` is the usual one; a triangular one may be cheaper. Vectors are
    flat, of shape ``(n,)``.
    """

    @abstractmethod
    def inverse(self, v: Tensor) -> Tensor:
        """:math:`P^{-1} v`, in fresh memory."""

    @abstractmethod
    def inverse_root(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """:math:`R^{-1} v`, written to ``out`` if it is given; ``out`` may be ``v``."""

    @abstractmethod
    def root(self, v: Tensor) -> Tensor:
        """:math:`R v`."""

    def transposed_inverse_root(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        r""":math:`R^{-\top} v`, as :meth:`inverse_root`, which it is for a symmetric root."""
        return self.inverse_root(v, out)
