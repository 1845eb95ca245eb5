"""Anchors that are saved and restored: everything that a resumed run needs of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fipoptim.anchors.held import HeldInputs
from fipoptim.anchors.networks import Snapshot
from fipoptim.anchors.route import Route
from fipoptim.anchors.sharded import ShardedFunction
from fipoptim.anchors.state import AnchorState


class SavedInputs(HeldInputs):
    """The part of :class:`fipoptim.AnchorBatch` that saves and loads.

    Attributes:
        batch_size: Anchors drawn for each step; None is all of them.
        route: The record of which derivatives are traced on these anchors.
        check: The check inputs as anchors of their own, or None.
    """

    batch_size: int | None
    route: Route
    check: SavedInputs | None
    _seed: int

    @torch.inference_mode(False)
    def state_dict(self) -> dict[str, Any]:
        """The state for a resumed run: a copy of inputs, reference outputs, reference networks and the draws' seed.

        Loads with ``torch.load(weights_only=True)``, and travels in ``torch.distributed.checkpoint``. It is the same on
        every rank.

        Raises:
            ValueError: If a copy of a fully sharded model gives reference outputs, of which each rank has a part.
        """
        return self._state().to_dict()

    def _state(self) -> AnchorState:
        sharded = isinstance(self.function, ShardedFunction)
        if sharded and any(isinstance(network, Snapshot) for network in self.references.networks):
            raise ValueError(
                "state_dict: a copy of the fully sharded model gives reference outputs (store='live', or augment), and "
                "each rank has a part of it. Keep outputs (store='full', no augment), or give a reference= of its own."
            )
        check = None if self.check is None else self.check._state()
        return AnchorState(self.inputs, self.references, self._seed, self.route, check)

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, so that a resumed run goes on along the same path.

        Every rank loads the same state; there may be another number of ranks than when it was saved.

        Raises:
            ValueError: If ``state`` is not of the form that :meth:`state_dict` gives, belongs to another model or
                output space, or holds NaN or infinite values. The anchors are then as they were.
        """
        loaded = AnchorState.from_dict(
            state,
            self.function,
            like=self.references,
            batch_size=self.batch_size,
            networks=self.takes_networks,
            checked=self.check is not None,
        )
        self._take_over(loaded)

    def _take_over(self, loaded: AnchorState) -> None:
        self.inputs, self.references = loaded.inputs, loaded.references
        self._seed, self.route = loaded.seed, loaded.route
        if self.check is not None and loaded.check is not None:
            self.check._take_over(loaded.check)
