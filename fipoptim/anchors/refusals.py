"""Refusals that several files share: numbers that are not finite, outputs of another width, a random model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_finite(x: Tensor) -> bool:
    """Whether ``x`` holds neither NaN nor infinite values; whole numbers always are finite."""
    return not (x.is_floating_point() or x.is_complex()) or bool(torch.isfinite(x).all())


def check_positive(name: str, value: Any, *, or_none: bool = False) -> None:
    """Refuse a ``value`` that is no positive integer, and with ``or_none`` not None either.

    Raises:
        ValueError: If it is neither.
    """
    if or_none and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        kind = "a positive integer or None" if or_none else "a positive integer"
        raise ValueError(f"{name}: must be {kind}, got {value!r}.")


def check_callable(name: str, value: Any) -> None:
    """Refuse a ``value`` that is neither callable nor None.

    Raises:
        TypeError: With its type.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name}: must be callable or None, got {type(value).__name__}.")


def check_store(store: Any, reference: Any) -> None:
    """Refuse a way of keeping reference outputs that does not exist, or that the reference does not allow.

    Raises:
        ValueError: With what there is.
    """
    if store not in ("full", "half", "live"):
        raise ValueError(f"store: choose 'full', 'half' or 'live', got {store!r}.")
    if store == "live" and isinstance(reference, Tensor):
        raise ValueError(
            "store: 'live' keeps no outputs, but reference is outputs; give a network, or store='full'."
        )


def check_no_nan(subject: str, x: Tensor, advice: str = "") -> None:
    """Refuse a tensor with values that are not finite.

    Args:
        subject: The beginning of the message, which names the tensor.
        x: The tensor.
        advice: The remedy, for the user.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    if not is_finite(x):
        raise ValueError(
            f"{subject} holds NaN or infinite values{f'; {advice}' if advice else ''}."
        )


def check_outputs(z: Tensor) -> Tensor:
    """The outputs ``z`` themselves, if they can be a reference.

    Raises:
        ValueError: If one is not finite.
    """
    if not is_finite(z):
        raise ValueError(
            "model: its outputs on the anchors are not finite; nothing can be preserved. "
            "Check the weights and the inputs."
        )
    return z


def check_width(z: Tensor, reference: Tensor) -> None:
    """Refuse outputs ``(N, m)`` if ``m`` is not that of the reference.

    Raises:
        ValueError: With a likely cause and what to do.
    """
    if z.shape[1] != reference.shape[1]:
        raise ValueError(
            f"model: gives {z.shape[1]} outputs an anchor now, the reference has {reference.shape[1]}. Did its head, "
            "or its vocabulary (resize_token_embeddings), grow since the anchors were made? Build the AnchorBatch with "
            "output= a function that picks the old outputs, for instance output=lambda z: z[:, :10], or refresh() the "
            "anchors to hold all that it gives now."
        )


def random_model() -> ValueError:
    """The error for a model whose outputs change from one evaluation to the next."""
    return ValueError(
        "model: two evaluations of the same anchors in eval mode differ, so there is no function to preserve. Switch "
        "off the randomness that stays on in eval mode (functional dropout with training=True, sampling, noise layers)."
    )
