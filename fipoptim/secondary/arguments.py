"""Checks of the arguments that the objectives share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# Takes the model's output and the labels, and returns a scalar.
LossFunction = Callable[[Tensor, Any], Tensor]


def checked_module(argument: str, value: Any) -> nn.Module:
    """``value``, which must be a module.

    Raises:
        TypeError: If it is not. The message names ``argument``.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"{argument}: must be a torch.nn.Module, got {type(value).__name__}.")
    return value


def checked_loss_function(loss_fn: Any) -> LossFunction:
    """``loss_fn``, which must be callable.

    Raises:
        TypeError: If it is not.
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn: must be a function of the output and y, got {type(loss_fn).__name__}."
        )
    return loss_fn  # type: ignore[no-any-return]


def checked_loss(loss: Any) -> Tensor:
    """The value of a loss function as a tensor without dimensions.

    Raises:
        ValueError: If it is not a tensor with one entry.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(
            f"loss_fn: must return a scalar tensor, got {got}; reduce it with .mean()."
        )
    return loss.reshape(())
