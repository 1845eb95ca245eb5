"""Anchors that travel in the state of their optimizer, so that one file resumes both."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.inputs import map_inputs, named_tensors
from fipoptim.integrations.wrapped import unwrapped

KEY = "anchors"  # the entry of the optimizer's state beside "state" and "param_groups"

_CARRYING: WeakSet[Optimizer] = WeakSet()


def carry_anchors(optimizer: Any) -> None:
    """Put the anchors into the optimizer's state, from which a resumed run takes them back.

    ``optimizer.state_dict()`` then has a further entry, ``"anchors"``, with what ``anchors.state_dict()`` gives.
    ``optimizer.load_state_dict()`` restores the anchors before it compares their reference with that of the state. A
    resumed run may thus build its anchors on the trained network: the first reference is put back. A state without the
    entry is loaded as without this function. A state that is refused changes neither the anchors nor the optimizer.

    Anchors stay on the device that they are on. ``torch.distributed.checkpoint`` saves no further entries of an
    optimizer's state, and so not the anchors: give it the anchors themselves, ``{..., "anchors": anchors}``.

    Args:
        optimizer: A :class:`~fipoptim.FIPOptimizer`, or a wrapper of Accelerate's or Lightning's around one. A second
            call changes nothing. Copies of the optimizer do not carry anchors.

    Raises:
        TypeError: If it is another optimizer.
    """
    optimizer = unwrapped(optimizer, "carry_anchors() takes no other")
    if optimizer in _CARRYING:
        return
    optimizer.register_state_dict_post_hook(_add)
    optimizer.register_load_state_dict_pre_hook(_restore)
    _CARRYING.add(optimizer)


def _add(optimizer: Any, state: dict[str, Any]) -> None:
    state[KEY] = optimizer.anchors.state_dict()


def _restore(optimizer: Any, state: dict[str, Any]) -> dict[str, Any] | None:
    if KEY not in state:
        return None
    rest = {name: part for name, part in state.items() if name != KEY}
    before = optimizer.anchors.state_dict()
    _load(optimizer.anchors, state[KEY])
    try:
        # Loaded here once, and again behind this hook: only here can a refusal put the anchors back.
        optimizer.load_state_dict(rest)
    except BaseException:
        _load(optimizer.anchors, before)
        raise
    return rest


def _load(anchors: AnchorBatch, state: dict[str, Any]) -> None:
    parts = [part for part in (anchors, anchors.check) if part is not None]
    devices = [next(iter(named_tensors(part.inputs).values())).device for part in parts]
    anchors.load_state_dict(state)
    for part, device in zip(parts, devices, strict=True):
        part.inputs = map_inputs(lambda x, device=device: x.to(device), part.inputs)  # type: ignore[misc]
