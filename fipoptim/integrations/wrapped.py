"""The FIPOptimizer behind the wrapper of a training loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.optimizer import FIPOptimizer
from fipoptim.parameters import all_params


def unwrapped(optimizer: Any, advice: str) -> FIPOptimizer:
    """The FIPOptimizer that ``optimizer`` is, or that it wraps as its attribute ``optimizer``.

    Args:
        optimizer: An optimizer of torch, of Accelerate or of Lightning.
        advice: What to do if there is none, for the message.

    Raises:
        TypeError: If there is none.
    """
    found = optimizer
    # Lightning's wrapper calls itself an instance of what it wraps, so a class cannot be asked for first.
    while hasattr(found, "optimizer"):
        found = found.optimizer
    if not isinstance(found, FIPOptimizer):
        raise TypeError(f"optimizer: must be a FIPOptimizer, got {type(found).__name__}; {advice}.")
    return found


def check_trains(optimizer: FIPOptimizer, parameters: Iterable[Tensor], owner: str) -> None:
    """Refuse an optimizer of another network than the one that is trained.

    Args:
        optimizer: The optimizer.
        parameters: All parameters of the network that is trained.
        owner: Who trains it, for the message.

    Raises:
        ValueError: If one of the optimizer's parameters is not among them.
    """
    own = {id(p) for p in parameters}
    foreign = sum(id(p) not in own for p in all_params(optimizer.param_groups))
    if foreign:
        raise ValueError(
            f"optimizer: {foreign} of its parameters are not those of the model that {owner} trains. Build the "
            f"{AnchorBatch.__name__} and the {FIPOptimizer.__name__} on that model, after every change of its modules."
        )


def refuse_clipping(name: str, value: float | None) -> None:
    """Refuse a bound on the norm or the values of gradients; None and 0 are none.

    Raises:
        ValueError: If there is a bound.
    """
    if value:
        raise ValueError(
            f"{name}: clipping rescales the gradient, and so beta, by another factor at each step; got {value}. "
            f"Set {name}=0: the length of a step is eps, however large its gradient is."
        )
