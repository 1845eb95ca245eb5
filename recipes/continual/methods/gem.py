"""Gradient episodic memory (Lopez-Paz and Ranzato, 2017), Avalanche's."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from recipes.common.options import NUMBER
from recipes.common.settings import option
from recipes.continual.methods.avalanche import AVALANCHE, AvalancheLearner
from recipes.continual.methods.base import Method, bytes_of
from recipes.continual.methods.plain import AdamOptions


@dataclass(frozen=True, kw_only=True)
class GEMOptions(AdamOptions):
    """Adam's options, and ``strength``: the memory strength (gamma)."""

    strength: float = option("memory strength (gamma)", default=0.5, **NUMBER)


class GEM(AvalancheLearner):
    """The gradient of each step is turned until no earlier task's loss rises, on its remembered inputs."""

    options: GEMOptions
    plugin_buffers = ("memory_x", "memory_y", "memory_tid")  # attributes of the plugin

    def make_plugin(self) -> Any:
        """See :class:`AvalancheLearner`; remembered inputs of every earlier task are in each step's constraints."""
        from recipes.continual.methods.avalanche_loop import RememberingGEM

        return RememberingGEM(
            self.settings.anchor_batch,
            self.generator,
            patterns_per_experience=sys.maxsize,
            memory_strength=self.options.strength,
        )

    def plugin_state(self) -> Any:
        """The inputs, their labels and what Avalanche takes for their tasks, by task."""
        return {name: getattr(self.plugin, name) for name in self.plugin_buffers}

    def load_plugin_state(self, state: Any) -> None:
        """See :class:`AvalancheLearner`."""
        for name in self.plugin_buffers:
            setattr(self.plugin, name, state[name])

    def remembered_bytes(self) -> int:
        """The bytes of the inputs and their labels."""
        return bytes_of((self.plugin.memory_x, self.plugin.memory_y))


METHOD = Method("gem", "GEM", GEM, GEMOptions, needs=AVALANCHE)
