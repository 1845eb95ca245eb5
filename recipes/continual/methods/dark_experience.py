"""Dark experience replay with labels, DER++ (Buzzega et al., 2020): outputs are held, and labels learnt again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fipoptim.anchors.held_outputs import OutputRange
from recipes.common.options import NUMBER
from recipes.common.settings import option
from recipes.continual.methods.base import Method, bytes_of
from recipes.continual.methods.distillation import Distillation, DistillationOptions
from recipes.continual.methods.replay import replaying


@dataclass(frozen=True, kw_only=True)
class DarkExperienceOptions(DistillationOptions):
    """The options of distillation, and ``label_strength``: the weight of the remembered labels' loss."""

    label_strength: float = option("weight of the remembered labels' loss", default=0.5, **NUMBER)


class DarkExperience(Distillation):
    """Distillation, and the loss on another draw of remembered inputs with their labels."""

    options: DarkExperienceOptions
    labels: Tensor | None = None

    def remember(self, inputs: Tensor, labels: Tensor, held: OutputRange | None = None) -> None:
        """Keeps the inputs, the outputs they have now, and their labels."""
        super().remember(inputs, labels, held)
        self.labels = labels if self.labels is None else torch.cat([self.labels, labels])

    def state(self) -> Any:
        """That of distillation, and the labels."""
        return {**super().state(), "labels": self.labels}

    def load(self, state: Any) -> None:
        """See :class:`Learner`."""
        super().load(state)
        self.labels = state["labels"]

    def remembered_bytes(self) -> int:
        """The bytes of the anchors, their reference outputs and their labels."""
        return super().remembered_bytes() + bytes_of(self.labels)

    def holding(self) -> Callable[[], Tensor]:
        """The drift on one draw of the anchors and the loss on another, both weighted."""
        drift, given = super().holding(), self.known_anchors().inputs
        inputs = given[0] if isinstance(given, tuple) else given
        assert isinstance(inputs, Tensor)
        assert self.labels is not None
        replayed = replaying(self, inputs, self.labels, self.options.label_strength)
        return lambda: drift() + replayed()


METHOD = Method("dark-experience", "DER++", DarkExperience, DarkExperienceOptions)
