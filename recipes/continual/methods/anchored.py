"""The base of the invariant path and distillation: anchors, each with the outputs it had when it was remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fipoptim import AnchorBatch
from fipoptim.anchors.held_outputs import HeldOutputs, OutputRange, augmented, with_ranges
from recipes.continual.methods.base import Learner, bytes_of


class AnchoredLearner(Learner):
    """A learner that remembers inputs as an ``AnchorBatch``; labels are not read."""

    anchors: AnchorBatch | None = None

    def set_aside(self) -> float | None:
        """The share of remembered inputs that no step sees, as ``AnchorBatch(check=)`` takes it; None is none."""
        return None

    def remember(self, inputs: Tensor, labels: Tensor, held: OutputRange | None = None) -> None:
        """Keeps the inputs and the outputs they have now."""
        new = inputs if held is None else with_ranges(inputs, held)
        if self.anchors is not None:
            self.anchors.extend(new, check=self.set_aside())
        else:
            self.anchors = self._make_anchors(new, self.set_aside())

    def _make_anchors(
        self, inputs: Tensor | Sequence[Tensor], check: Tensor | Sequence[Tensor] | float | None
    ) -> AnchorBatch:
        """Anchors of inputs, or of inputs with the ranges of their outputs that are held."""
        ranges = not isinstance(inputs, Tensor)
        return AnchorBatch(
            HeldOutputs(self.model) if ranges else self.model,
            inputs,
            check=check,
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
        saved = state["anchors"]
        check = None if saved["check"] is None else _first(saved["check"]["inputs"], 1)
        self.anchors = self._make_anchors(
            _first(saved["inputs"], self.settings.anchors_drawn or 1), check
        )
        self.anchors.load_state_dict(saved)
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


def _first(inputs: Tensor | tuple[Tensor, ...], count: int) -> Tensor | tuple[Tensor, ...]:
    """The first ``count`` of some inputs, which may have the ranges of their outputs beside them."""
    if isinstance(inputs, Tensor):
        return inputs[:count]
    return tuple(part[:count] for part in inputs)
