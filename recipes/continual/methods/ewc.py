"""Elastic weight consolidation (Kirkpatrick et al., 2017), Avalanche's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recipes.common.options import NUMBER
from recipes.common.settings import option
from recipes.common.training import batch_norms
from recipes.continual.methods.avalanche import AVALANCHE, AvalancheLearner
from recipes.continual.methods.base import Method, bytes_of
from recipes.continual.methods.plain import AdamOptions


@dataclass(frozen=True, kw_only=True)
class EWCOptions(AdamOptions):
    """Adam's options, and ``strength``: the weight of the penalty (lambda)."""

    strength: float = option("weight of the penalty (lambda)", default=100.0, **NUMBER)


class EWC(AvalancheLearner):
    """One quadratic penalty for each earlier task, on the distance from the weights it ended with."""

    options: EWCOptions

    @property
    def remember_batch(self) -> int:
        """1, because the squared gradients are those of single inputs; 50 if batch norm needs a batch."""
        return 50 if batch_norms(self.model) and not self.freeze_batch_norm else 1

    def make_plugin(self) -> Any:
        """See :class:`AvalancheLearner`."""
        from recipes.continual.methods.avalanche_loop import RememberingEWC

        return RememberingEWC(ewc_lambda=self.options.strength)

    def plugin_state(self) -> Any:
        """The weights after each task and their importances, by task and name."""
        return {
            kind: {
                task: {name: data.data for name, data in by_name.items()}
                for task, by_name in getattr(self.plugin, kind).items()
            }
            for kind in ("saved_params", "importances")
        }

    def load_plugin_state(self, state: Any) -> None:
        """See :class:`AvalancheLearner`."""
        from avalanche.training.utils import ParamData

        for kind, tasks in state.items():
            plugin_has = getattr(self.plugin, kind)
            for task, by_name in tasks.items():
                plugin_has[task] = {
                    name: ParamData(name, init_tensor=tensor, device=tensor.device)
                    for name, tensor in by_name.items()
                }

    def remembered_bytes(self) -> int:
        """The bytes of the weights after each task and of their importances."""
        return bytes_of(self.plugin_state())


METHOD = Method("ewc", "EWC", EWC, EWCOptions, needs=AVALANCHE)
