"""The record of which derivatives are traced and which are taken as the model runs.

Both are right, and differ in the last digits. A resumed or copied run has to go the same way to repeat a run bit for
bit, so what decides it belongs to the anchors and to their state, and the traces themselves do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

# A trace is made for each shape of a block of anchors. Inputs of ever new shapes, or a model whose behaviour changes
# from step to step, are not worth tracing: beyond so many traces, or traces found to be out of date, none are made.
MOST_TRACES, MOST_STALE = 16, 4


@dataclass
class Route:
    """The decisions made so far for one set of anchors.

    Attributes:
        traced: The shapes that have a trace, each as a digest, in the order in which they came.
        stale: How often the traces were found to be out of date.
        channels_last: Whether images are handed over channel by channel last, which convolutions on a CPU prefer.
            A model that reads its feature maps with ``view`` refuses it.
        mixing: Whether the outputs of an anchor depend on the others, as with batch norm that normalises by the
            batch; None if it is not known yet.
    """

    traced: list[str] = field(default_factory=list)
    stale: int = 0
    channels_last: bool = True
    mixing: bool | None = None

    @property
    def traces(self) -> bool:
        """Whether any shape is traced at all."""
        return self.stale < MOST_STALE and not self.mixing

    def admits(self, shape: str) -> bool:
        """Whether a shape is to be traced, which is remembered."""
        if shape in self.traced:
            return True
        if len(self.traced) >= MOST_TRACES:
            return False
        self.traced.append(shape)
        return True

    def found_stale(self) -> None:
        """Start over after traces were found to be out of date."""
        self.traced = []
        self.stale += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain values, which ``torch.load(weights_only=True)`` reads."""
        return {
            "traced": list(self.traced),
            "stale": self.stale,
            "channels_last": self.channels_last,
            "mixing": self.mixing,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """The route that :meth:`state_dict` described.

        Raises:
            ValueError: If ``state`` is of another form.
        """
        right = (
            isinstance(state, Mapping)
            and state.keys() == {"traced", "stale", "channels_last", "mixing"}
            and isinstance(state["traced"], list)
            and all(isinstance(shape, str) for shape in state["traced"])
            and type(state["stale"]) is int
            and state["stale"] >= 0
            and isinstance(state["channels_last"], bool)
            and isinstance(state["mixing"], bool | None)
        )
        if not right:
            raise ValueError(
                f"state: 'route' is not what AnchorBatch.state_dict() gives: {state!r}."
            )
        return cls(list(state["traced"]), state["stale"], state["channels_last"], state["mixing"])
