"""Learning without forgetting (Li and Hoiem, 2016), Avalanche's."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from recipes.common.options import NUMBER
from recipes.common.settings import option
from recipes.continual.methods.avalanche import AVALANCHE, AvalancheLearner
from recipes.continual.methods.base import Method, bytes_of
from recipes.continual.methods.plain import AdamOptions


@dataclass(frozen=True, kw_only=True)
class LwFOptions(AdamOptions):
    """Adam's options, and ``strength``: the weight of the distillation (alpha)."""

    strength: float = option("weight of the distillation (alpha)", default=1.0, **NUMBER)


class LwF(AvalancheLearner):
    """Distillation on the new task's inputs; the remembered inputs only tell which classes there were."""

    options: LwFOptions

    def make_plugin(self) -> Any:
        """See :class:`AvalancheLearner`."""
        from recipes.continual.methods.avalanche_loop import RememberingLwF

        return RememberingLwF(alpha=self.options.strength, temperature=2)

    def plugin_state(self) -> Any:
        """The network after the last task, and the classes that there were."""
        lwf = self.plugin.lwf
        return {
            "model": None if lwf.prev_model is None else lwf.prev_model.state_dict(),
            "classes": {task: sorted(known) for task, known in lwf.prev_classes_by_task.items()},
            "tasks": lwf.expcount,
        }

    def load_plugin_state(self, state: Any) -> None:
        """See :class:`AvalancheLearner`."""
        lwf = self.plugin.lwf
        if state["model"] is not None:
            lwf.prev_model = copy.deepcopy(self.strategy.model)
            lwf.prev_model.load_state_dict(state["model"])
        lwf.prev_classes_by_task.update({t: set(known) for t, known in state["classes"].items()})
        lwf.expcount = state["tasks"]

    def remembered_bytes(self) -> int:
        """The bytes of the network after the last task."""
        before = self.plugin.lwf.prev_model
        return 0 if before is None else bytes_of(before.state_dict())


METHOD = Method("lwf", "LwF", LwF, LwFOptions, needs=AVALANCHE)
