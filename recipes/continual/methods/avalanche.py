"""A method of Avalanche's as a learner: a plugin around plain training by Adam.

Avalanche is imported when a learner is made, so that the command line can list these methods without it.
"""

from __future__ import annotations

import itertools
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fipoptim.anchors.held_outputs import OutputRange
from recipes.continual.methods.base import Batches, Learner, Needs
from recipes.continual.methods.plain import AdamOptions

AVALANCHE = Needs("avalanche-lib", "avalanche.training.templates")


class AvalancheLearner(Learner):
    """A plugin of Avalanche around plain training by Adam.

    The remembered inputs are all that the plugin is shown of an earlier task: they are an experience of no epochs, at
    whose end the plugin computes or keeps what it needs.
    """

    options: AdamOptions

    def __init__(self, *args: Any, **keywords: Any) -> None:
        from recipes.continual.methods import avalanche_loop

        super().__init__(*args, **keywords)
        self.seconds = 0.0  # spent on remembering; they are counted with the next task
        self.plugin = self.make_plugin()
        self.strategy = avalanche_loop.strategy(
            self.model,
            self.plugin,
            loss=self.loss,
            batch_size=self.remember_batch,
            freeze_batch_norm=self.freeze_batch_norm,
        )

    @property
    def remember_batch(self) -> int:
        """How many remembered inputs the plugin gets at a time when it goes through them at the end of a task."""
        return 100

    @abstractmethod
    def make_plugin(self) -> Any:
        """Makes the plugin that holds the earlier tasks."""

    @abstractmethod
    def plugin_state(self) -> Any:
        """What the plugin holds, as tensors and plain values: a checkpoint has no objects of Avalanche's."""

    @abstractmethod
    def load_plugin_state(self, state: Any) -> None:
        """Gives the plugin what :meth:`plugin_state` returned."""

    def remember(self, inputs: Tensor, labels: Tensor, held: OutputRange | None = None) -> None:
        """Shows the plugin these inputs as the task that has just been learnt."""
        from recipes.continual.methods.avalanche_loop import experience

        start = time.perf_counter()
        self.strategy.train_epochs = 0
        self.strategy.train(experience(inputs, labels), eval_streams=[])
        self.seconds += time.perf_counter() - start

    def state(self) -> Any:
        """What the plugin holds of the tasks, how many it has seen, and the time spent on that."""
        return {
            "held": self.plugin_state(),
            "tasks": self.strategy.clock.train_exp_counter,
            "seconds": self.seconds,
            "generator": self.generator.get_state(),
        }

    def load(self, state: Any) -> None:
        """See :class:`Learner`."""
        self.load_plugin_state(state["held"])
        self.strategy.clock.train_exp_counter = state["tasks"]
        self.seconds = state["seconds"]
        self.generator.set_state(state["generator"])

    def learn(
        self,
        batches: Batches,
        *,
        steps: int,
        after_step: Callable[[int], None] | None = None,
        record: tuple[int, Path] | None = None,
    ) -> float:
        """See :class:`Learner`."""
        from recipes.continual.methods.avalanche_loop import Course, experience

        first = next(batches)
        course = Course(
            itertools.chain([first], batches),
            steps,
            lr=self.options.lr,
            momentum=self.options.momentum,
            after_step=after_step,
        )
        start = time.perf_counter()
        self.strategy.train_epochs = 1
        self.strategy.plugins.insert(0, course)
        try:
            # Avalanche asks for an experience; the batches come from the course.
            self.strategy.train(experience(*first), eval_streams=[])
        finally:
            self.strategy.plugins.remove(course)
        # For the plugins the experience goes on until its inputs are remembered.
        self.strategy.clock.train_exp_counter -= 1
        seconds = time.perf_counter() - start - course.seconds_testing + self.seconds
        self.seconds = 0.0
        return seconds
