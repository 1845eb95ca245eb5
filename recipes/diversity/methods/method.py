"""The base of all methods that make an ensemble."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from recipes.common.data import Task
from recipes.diversity.objectives.objective import Objective
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.source import EnsembleSource, Member


class Method(ABC):
    """A way to make an ensemble from one trained network.

    A new method derives from this class and is registered in ``recipes.diversity.methods``.

    Attributes:
        own_option_kinds: The dataclasses of the method's own options (``recipes.common.settings.option``), which it
            reads with ``settings.of(kind)``.
        is_path: Whether it is a functionally invariant path.
        is_resumable: Whether :meth:`members` can go on after the members that ``files`` already holds.
        needs_distances: Whether it needs the distances of another ensemble's members, those of a path.

    Args:
        title: The name in tables and plots.
        objective: The objective that members minimise beside keeping the function; None if there is none.
    """

    own_option_kinds: ClassVar[tuple[type, ...]] = ()
    is_path: ClassVar[bool] = False
    is_resumable: ClassVar[bool] = False
    needs_distances: ClassVar[bool] = False

    def __init__(self, title: str, objective: Objective | None = None) -> None:
        self.title, self.objective = title, objective

    @property
    def option_kinds(self) -> tuple[type, ...]:
        """The dataclasses of the options of the method and of its objective."""
        of_objective = () if self.objective is None else self.objective.option_kinds
        return (*self.own_option_kinds, *of_objective)

    @abstractmethod
    def total_steps(self, task: Task, settings: EnsembleSettings) -> int:
        """The number of steps to a whole ensemble."""

    @abstractmethod
    def members(self, source: EnsembleSource, files: Sequence[Path]) -> Iterator[Member]:
        """Makes the members one after the other.

        Args:
            source: The start network and everything else that the ensemble is made from.
            files: The files of the members so far. It grows, as each member is saved before the next is made.
        """
