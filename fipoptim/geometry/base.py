r"""The base class of geometries: the norm :math:`\|v\|_P` of a step, and a memory from step to step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fipoptim.geometry.diagonal import DiagonalPreconditioner
from fipoptim.geometry.running_means import Memory, running_mean
from fipoptim.parameters import StepParameters
from fipoptim.solver.preconditioner import Preconditioner
from fipoptim.solver.space import Space


class Geometry(ABC):
    r"""The norm of a step.

    The optimizer makes a geometry for each step. :meth:`average` is called first if the step has an objective, then
    :meth:`update`. Both may read the memory and keep tensors in it; these count only if the step stands.

    Args:
        parameters: The parameters of the step, with their options. Flat vectors are laid out as ``parameters.flat``.
        memory: The tensors remembered for each parameter.

    Attributes:
        divisible: Whether vectors may be divided among ranks, as ``fully_shard`` divides parameters: a geometry then
            sees the parts of one rank, and takes sums over all weights from ``parameters.space``.
    """

    divisible: ClassVar[bool] = False

    def __init__(self, parameters: StepParameters, memory: Memory) -> None:
        self.check_space(parameters.space)
        self.parameters = parameters
        self.memory = memory

    @classmethod
    def check_space(cls, space: Space) -> None:
        """Refuse vectors that are divided among ranks, if the geometry cannot measure them.

        Raises:
            ValueError: With what to use.
        """
        if not (space.whole or cls.divisible):
            raise ValueError(
                f"precondition: {cls.__name__} needs whole matrices or vectors of weights, and fully_shard divides "
                "them among ranks. Use 'adam' or None."
            )

    @classmethod
    def entries(cls, p: Tensor, matrix: bool | None) -> tuple[str, ...]:
        """The names under which the geometry keeps tensors in the shape of the parameter ``p``.

        Args:
            p: The parameter.
            matrix: False if the weights of ``p`` are not to be measured as a matrix: see :class:`StepParameters`.
        """
        return ()

    @classmethod
    def kind(cls, p: Tensor, matrix: bool | None) -> str:
        """What the parameter ``p`` is measured by, in a word or two, for :func:`fipoptim.geometry.describe`."""
        return cls.__name__.lower()

    def average(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradient ``b`` with momentum, one tensor a parameter: here its running mean."""
        means = running_mean(gradients, self.parameters.momentum, self.memory)
        return gradients if means is None else means

    @abstractmethod
    def update(self, linear: Tensor, size: float, *, objective: bool) -> Preconditioner | None:
        r"""The preconditioner ``P`` of this step; None for the identity.

        ``P`` is scaled so that the mean of its diagonal is about 1, before :attr:`StepParameters.stretch` multiplies
        :math:`P^{1/2}` for each parameter. The length ``eps`` then means the same in every geometry.

        Args:
            linear: The linear term :math:`c = \beta b + \frac2N J^\top r`, flat, shape ``(n,)``. It may be written to.
            size: The Euclidean length of ``linear``.
            objective: Whether there is an objective; without one (L = 0) only ``r`` is in the linear term.
        """


class DiagonalGeometry(Geometry):
    """A geometry whose ``P`` is diagonal: a subclass says what the diagonal is, up to a factor."""

    @abstractmethod
    def diagonal(self, linear: Tensor) -> Tensor:
        """The diagonal of ``P`` up to a factor, flat, shape ``(n,)``: positive, or zero everywhere for the identity.

        Args:
            linear: The linear term ``c``, flat, shape ``(n,)``.
        """

    def update(self, linear: Tensor, size: float, *, objective: bool) -> Preconditioner:
        """See :class:`Geometry`.

        Raises:
            RuntimeError: If :meth:`diagonal` is not positive and finite, or not of the shape ``(n,)``.
        """
        diagonal, space = self.diagonal(linear), self.parameters.space
        if diagonal.shape == linear.shape and not space.any(bool(diagonal.any()))[0]:
            diagonal = torch.ones_like(linear)
        counted, zeros = diagonal.double(), self.parameters.zeros
        if zeros is not None and diagonal.shape == linear.shape:
            counted = counted[~self.parameters.flat.flatten(zeros).bool()]  # the weights that move
        total, count = space.sums(float(counted.sum()), float(counted.numel()))
        mean = total / max(count, 1.0)
        least = -space.largest(-float(diagonal.min()) if diagonal.numel() else -math.inf)[0]
        wrong = diagonal.shape != linear.shape or not (least > 0 and mean < math.inf)
        if space.any(wrong)[0]:
            raise RuntimeError(
                f"geometry: the diagonal of {type(self).__name__} must be positive and finite, of shape "
                f"{tuple(linear.shape)}; got shape {tuple(diagonal.shape)}, least entry {least:.3g}, mean {mean:.3g}. "
                "No weight was changed."
            )
        diagonal = diagonal / mean
        for view, factor in zip(
            self.parameters.flat.views(diagonal), self.parameters.stretch, strict=True
        ):
            view.mul_(factor**2)
        return DiagonalPreconditioner(diagonal)
