"""What a network is to learn, and what is to stay: the base of the problems that ``recipes.finetune`` knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes.common.data import DataError
from recipes.finetune.case import Case, Unseen

# The share of the inputs of each kind that only results are measured on. They are the same in every run, so that
# settings can be chosen on the others.
RESERVED = 0.4
_RESERVING_SEED = 0


class Start(NamedTuple):
    """What all methods of a seed begin with, and the inputs on which they are measured."""

    case: Case
    unseen: Unseen


class Problem(ABC):
    """A pretrained network with inputs of both kinds, loaded once for all seeds.

    Attributes:
        identity: What tells this problem from others in the configuration of results; JSON can hold it.
    """

    identity: Mapping[str, Any]

    @abstractmethod
    def start(self, seed: int) -> Start:
        """Draws the inputs of a seed, which have none in common, and makes the network with its new outputs."""


class Pool:
    """Inputs of one kind, by their numbers, from which parts without common members are taken.

    Args:
        name: What the inputs are called in messages.
        count: The number of inputs.
        development: Whether the inputs that are reserved for results are left alone, and others take their place.
        seed: The seed of the draw.
    """

    def __init__(self, name: str, count: int, *, development: bool, seed: int) -> None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(_RESERVING_SEED))
        reserved = round(RESERVED * count)
        generator = torch.Generator().manual_seed(seed)
        self._name, self._development = name, development
        self._reserved, self._others = (
            part[torch.randperm(len(part), generator=generator)]
            for part in (order[:reserved], order[reserved:])
        )

    def unseen(self, option: str, wanted: int) -> Tensor:
        """Takes inputs on which networks are measured; all of them must be taken before :meth:`given`.

        Raises:
            DataError: If there are too few.
        """
        if self._development:
            return self.given(option, wanted)
        taken, self._reserved = self._taken(option, wanted, self._reserved)
        return taken

    def given(self, option: str, wanted: int) -> Tensor:
        """Takes inputs that methods are given.

        Raises:
            DataError: If there are too few.
        """
        taken, self._others = self._taken(option, wanted, self._others)
        return taken

    @property
    def left(self) -> int:
        """How many inputs are left that methods may be given."""
        return len(self._others)

    @property
    def left_unseen(self) -> int:
        """How many inputs are left to measure on."""
        return len(self._others if self._development else self._reserved)

    def _taken(self, option: str, wanted: int, among: Tensor) -> tuple[Tensor, Tensor]:
        if wanted > len(among):
            raise DataError(
                f"argument --{option}: {wanted} is more than the {len(among)} {self._name} left for it"
            )
        return among[:wanted], among[wanted:]
