"""Refusals that several files share: numbers that are not finite, outputs of another width, a random model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_finite(x: Tensor) -> bool:
    """Whether ``x`` holds neither NaN nor infinite values; whole numbers always are finite."""
    return not (x.is_floating_point() or x.is_complex()) or bool(torch.isfinite(x).all())


def check_positive(name: str, value: Any, *, or_none: bool = False, least: int = 1) -> None:
    """Refuse a ``value`` that is no integer from ``least`` on, and with ``or_none`` not None either.

    Raises:
        ValueError: If it is neither.
    """
    if or_none and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer >= {least}"
        kind += " or None" if or_none else ""
        raise ValueError(f"{name}: must be {kind}, got {value!r}.")


def check_callable(name: str, value: Any) -> None:
    """Refuse a ``value`` that is neither callable nor None.

    Raises:
        TypeError: With its type.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name}: must be callable or None, got {type(value).__name__}.")


def check_store(store: Any, reference: Any, output: Any, spaces: tuple[str, ...]) -> None:
    """Refuse a way of keeping reference outputs that does not exist, or that the other arguments do not allow.

    Args:
        store: The way.
        reference: The reference as given.
        output: The output space as given.
        spaces: The spaces in which classes can be put together.

    Raises:
        ValueError: With what there is.
    """
    number = isinstance(store, int) and not isinstance(store, bool) and store > 0
    if not number and store not in ("full", "half", "live"):
        raise ValueError(
            f"store: choose 'full', 'half', 'live' or a positive number of classes, got {store!r}."
        )
    if number and output not in spaces:
        raise ValueError(
            f"store: {store} of the classes can be told apart only with output one of {list(spaces)}, got {output!r}."
        )
    if store not in ("full", "half") and isinstance(reference, Tensor):
        raise ValueError(
            f"store: {store!r} takes no outputs as reference; give a network, or store='full'."
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


def outputs_not_finite() -> RuntimeError:
    """The error for a model whose outputs on the anchors are not finite at today's weights."""
    return RuntimeError(
        "model: its outputs on the anchors are not finite at today's weights; nothing was changed. "
        "Lower the learning rate or eps, or check the weights."
    )


def random_model() -> ValueError:
    """The error for a model whose outputs change from one evaluation to the next."""
    return ValueError(
        "model: two evaluations of the same anchors in eval mode differ, so there is no function to preserve. Switch "
        "off the randomness that stays on in eval mode (functional dropout with training=True, sampling, noise layers)."
    )
