"""Experience replay: remembered inputs are learnt again, with their labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fipoptim.anchors.held_outputs import OutputRange
from recipes.common.options import NUMBER
from recipes.common.settings import option
from recipes.continual.methods.base import Learner, Method, bytes_of
from recipes.continual.methods.plain import AdamOptions, Plain


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(AdamOptions):
    """Adam's options, and ``strength``: the weight of the remembered inputs' loss."""

    strength: float = option("weight of the remembered inputs' loss", default=1.0, **NUMBER)


class Replay(Plain):
    """Adam on the losses of the new task's batch and of a draw from the replay buffer."""

    options: ReplayOptions
    buffer: tuple[Tensor, Tensor] | None = None  # inputs and labels

    def remember(self, inputs: Tensor, labels: Tensor, held: OutputRange | None = None) -> None:
        """Keeps the inputs and their labels."""
        if self.buffer is not None:
            inputs = torch.cat([self.buffer[0], inputs])
            labels = torch.cat([self.buffer[1], labels])
        self.buffer = inputs, labels

    def state(self) -> Any:
        """The inputs and their labels, and the state of the random draws."""
        return {"memory": self.buffer, "generator": self.generator.get_state()}

    def load(self, state: Any) -> None:
        """See :class:`Learner`."""
        self.buffer = state["memory"]
        self.generator.set_state(state["generator"])

    def remembered_bytes(self) -> int:
        """The bytes of the inputs and their labels."""
        return bytes_of(self.buffer)

    def holding(self) -> Callable[[], Tensor] | None:
        """The loss on a draw from the replay buffer, weighted; None if the buffer is empty."""
        if self.buffer is None:
            return None
        return replaying(self, *self.buffer, self.options.strength)


def replaying(
    learner: Learner, inputs: Tensor, labels: Tensor, strength: float
) -> Callable[[], Tensor]:
    """The learner's loss on a new draw of remembered inputs and their labels at each call, weighted."""

    def replayed() -> Tensor:
        order = torch.randperm(len(inputs), generator=learner.generator)
        chosen = order[: learner.settings.anchor_batch]
        x, y = inputs[chosen.to(inputs.device)], labels[chosen.to(labels.device)]
        return strength * learner.loss(learner.model(x), y)

    return replayed


METHOD = Method("replay", "replay, labels", Replay, ReplayOptions)
