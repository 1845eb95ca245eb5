"""Independent networks: each is trained from scratch with a seed of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from recipes.common.data import Task
from recipes.diversity.methods.method import Method
from recipes.diversity.settings import EnsembleSettings
from recipes.diversity.source import EnsembleSource, Member
from recipes.diversity.training import train_network, training_steps


class Independent(Method):
    """Trains every member from scratch."""

    is_resumable = True

    def total_steps(self, task: Task, settings: EnsembleSettings) -> int:
        """See :class:`Method`."""
        return settings.members * training_steps(task, settings)

    def members(self, source: EnsembleSource, files: Sequence[Path]) -> Iterator[Member]:
        """Trains the members that ``files`` lacks."""
        for k in range(len(files), source.settings.members):
            model = train_network(
                source.build,
                source.task,
                source.settings,
                augment=source.augment,
                seed=1000 * (source.seed + 1) + k,  # far from the seeds of the start networks
                progress=source.progress,
            )
            yield Member(model.state_dict())
