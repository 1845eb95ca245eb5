"""Weight noise: the start network moved in random directions, as far as the members of a path."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from recipes.common.data import Task
from recipes.diversity.methods.method import Method
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.source import EnsembleSource, Member


class WeightNoise(Method):
    """Moves every member in a random direction of its own."""

    needs_distances = True

    def total_steps(self, task: Task, settings: EnsembleSettings) -> int:
        """No step is taken."""
        return 0

    def members(self, source: EnsembleSource, files: Sequence[Path]) -> Iterator[Member]:
        """Makes a member for each of ``source.distances``."""
        generator = torch.Generator().manual_seed(source.seed)
        for distance in source.distances:
            model = copy.deepcopy(source.start)
            parameters = list(model.parameters())
            noise = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
            norm = math.sqrt(sum(float(part.square().sum()) for part in noise))
            with torch.no_grad():
                for parameter, part in zip(parameters, noise, strict=True):
                    parameter.add_(part, alpha=distance / norm)
            yield Member(model.state_dict())
