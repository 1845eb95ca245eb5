"""The base of the invariant path and distillation: anchors, each with the outputs it had when it was remembered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fipoptim import AnchorBatch
from recipes.continual.known_outputs import HeldOutputs, OutputRange, augmented, with_ranges
from recipes.continual.methods.base import Learner, bytes_of


class AnchoredLearner(Learner):
    """A learner that remembers inputs as an ``AnchorBatch``; labels are not read."""

    anchors: AnchorBatch | None = None

    def remember(self, inputs: Tensor, labels: Tensor, held: OutputRange | None = None) -> None:
        """Keeps the inputs and the outputs they have now."""
        new = inputs if held is None else with_ranges(inputs, held)
        if self.anchors is not None:
            self.anchors.extend(new)
            return
        ranges = held is not None
        self.anchors = AnchorBatch(
            HeldOutputs(self.model) if ranges else self.model,
            new,
            output=self.settings.output_space,
            batch_size=self.settings.anchors_drawn,
            augment=augmented(self.augment) if ranges and self.augment else self.augment,
            generator=self.generator,
        )

    def state(self) -> Any:
        """The anchors with their reference outputs, and the state of the random draws."""
        return {
            "anchors": self.known_anchors().state_dict(),
            "generator": self.generator.get_state(),
        }

    def load(self, state: Any) -> None:
        """See :class:`Learner`."""
        count, inputs, held = self.settings.anchors_drawn or 1, state["anchors"]["inputs"], None
        if isinstance(inputs, tuple):
            inputs, ranges = inputs
            held = tuple(ranges[0].tolist())
        self.remember(inputs[:count], torch.empty(0), held)
        self.known_anchors().load_state_dict(state["anchors"])
        self.generator.set_state(state["generator"])

    def known_anchors(self) -> AnchorBatch:
        """The anchors.

        Raises:
            RuntimeError: If nothing was remembered yet.
        """
        if self.anchors is None:
            raise RuntimeError("call remember() with inputs of an earlier task before learn()")
        return self.anchors

    def remembered_bytes(self) -> int:
        """The bytes of the anchors, their reference outputs, and with augmentation the reference networks."""
        return 0 if self.anchors is None else bytes_of(self.anchors.state_dict())
