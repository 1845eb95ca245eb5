"""An optimizer of one network's parameters that is saved, resumed, copied and pickled as those of ``torch.optim``."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.optim import Optimizer

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.checks import check_options, checked_state
from fipoptim.geometry import GEOMETRIES
from fipoptim.geometry.layers import other_than_matrices
from fipoptim.metric.parameters import parameter_names
from fipoptim.parameters import StepParameters
from fipoptim.shards import space_of
from fipoptim.state import begin_state, begin_within


class SavedOptimizer(Optimizer):
    """The part of :class:`fipoptim.FIPOptimizer` that saves and loads.

    Attributes:
        anchors: The anchors, whose model owns the parameters.
        precondition: The name of the geometry, which says what may be in the state.
    """

    anchors: AnchorBatch
    precondition: str | None
    _OWN: ClassVar[tuple[str, ...]] = ()

    # With this attribute a GradScaler does not unscale on its own, but hands its scale over; step() refuses it.
    _step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters, which may have its own ``lr``, ``beta``, ``momentum``, ``keep_zeros``.

        A group may also have a ``matrix``: in Muon's geometry, True measures all its weights as matrices that have two
        sides, and False none; None, or nothing, measures those as matrices that are by custom.

        Raises:
            ValueError: If an option is negative or not finite, or a parameter is not the model's.
            TypeError: If a parameter is complex, integer, sparse or of half precision.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
            parameter_names(self.anchors.model, group["params"])
            GEOMETRIES[self.precondition].check_space(space_of(group["params"]))
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """The content of a pickle or copy: the base class carries only defaults, state and groups."""
        return super().__getstate__() | {name: getattr(self, name) for name in self._OWN}

    def __repr__(self) -> str:
        """As torch's, without the entries that only a resumed run needs."""
        lines = super().__repr__().splitlines()
        return "\n".join(x for x in lines if not x.strip().startswith(("reference:", "seed:")))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the content of a pickle, or the state that ``load_state_dict`` has read, which is checked here."""
        if "anchors" not in state:
            geometry = GEOMETRIES[self.precondition]
            reference = self.anchors.fingerprint()
            with self.anchors.ranks.together("load_state_dict"):
                checked = checked_state(
                    state["state"],
                    state["param_groups"],
                    reference,
                    lambda p: geometry.entries(p, False),
                )
            state = state | {"state": checked}
        super().__setstate__(state)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; each group carries the fingerprint of the anchors' present reference."""
        reference = self.anchors.fingerprint()
        for group in self.param_groups:
            group["reference"] = reference
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as in ``torch.optim``. A state with an error in it is refused whole.

        The anchors are not in it. Restore them first, by ``anchors.load_state_dict``, or build them on the network that
        is their reference before its trained weights are loaded.

        Raises:
            ValueError: If it is the state of another optimizer, of other parameters, or of other reference outputs than
                those that the anchors hold.
        """
        super().load_state_dict(state_dict)

    def measured(self, parameters: StepParameters) -> StepParameters:
        """``parameters``, with what is said of the layers of the model: which weights are no matrices, by custom."""
        return parameters.but_for(other_than_matrices(self.anchors.model))

    def begin_resting(self, *, within: bool) -> None:
        """Begin the state of parameters that have a gradient and an ``lr`` of 0.

        Distributed checkpointing asks for it: it loads a state into the one that such a step leaves. The next step
        takes these zeros for no state at all.
        """
        resting = StepParameters.of_groups(
            self.param_groups, lambda g, p: float(g["lr"]) == 0 and p.grad is not None
        )
        resting = self.measured(resting)
        begin_state(self.state, resting, GEOMETRIES[self.precondition], own_memory=True)
        if within:
            begin_within(self.state, resting.originals)
