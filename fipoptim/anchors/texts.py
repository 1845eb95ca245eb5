"""Refusals of texts: labels, masks and tokens that do not fit, and outputs that depend on padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fipoptim.anchors.bundle import MASK, Bundle
from fipoptim.anchors.inputs import Inputs

# The keywords of which a model of Hugging Face has as many columns as the attention mask.
OF_POSITIONS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
LABELS = ("labels", "label")


def check_texts(inputs: Inputs, subject: str) -> None:
    """Refuse keyword inputs with labels, or with an attention mask that does not fit.

    Raises:
        ValueError: With the name.
    """
    if not isinstance(inputs, dict):
        return
    for name in LABELS:
        if name in inputs:
            raise ValueError(
                f"{subject}: holds {name!r}, with which a model of Hugging Face computes a loss. Anchors have no "
                f"labels; drop them: {{k: x for k, x in inputs.items() if k != {name!r}}}."
            )
    mask = inputs.get(MASK)
    if mask is None:
        return
    if mask.dim() == 1:
        raise ValueError(
            f"{subject}[{MASK!r}]: must have shape (N, T), one row a text, got {tuple(mask.shape)}. Give single texts "
            "with a first dimension of 1."
        )
    if mask.dim() > 2:
        return  # a mask of pairs of positions, which does not say which outputs count
    for name in OF_POSITIONS:
        x = inputs.get(name)
        if x is not None and x.dim() > 1 and x.shape[1] != mask.shape[1]:
            raise ValueError(
                f"{subject}[{MASK!r}]: has {mask.shape[1]} positions, but {name!r} has {x.shape[1]}: shapes "
                f"{tuple(mask.shape)} and {tuple(x.shape)}. Give both as the tokenizer returns them."
            )
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"{subject}[{MASK!r}]: must hold 1 where a position counts and 0 where it is padding, got values from "
            f"{mask.min()} to {mask.max()}."
        )


def check_ids(model: nn.Module, inputs: Inputs, subject: str = "inputs") -> None:
    """Refuse tokens that the model's table of embeddings does not have, such as those of another tokenizer.

    Args:
        model: The model. Nothing is checked unless it has ``get_input_embeddings()``, as models of Hugging Face do.
        inputs: The inputs.
        subject: The beginning of the message.

    Raises:
        ValueError: With the largest or smallest token.
    """
    tokens = inputs.get("input_ids") if isinstance(inputs, dict) else inputs
    getter = getattr(model, "get_input_embeddings", None)
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or getter is None:
        return
    try:
        rows = getattr(getter(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):  # a model without one table of embeddings
        return
    if not isinstance(rows, int):
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= rows:
        raise ValueError(
            f"{subject}: has the token {low if low < 0 else high}, but the model's table of embeddings has {rows} "
            "rows. Tokenize with the model's own tokenizer, or resize the embeddings before the anchors are made."
        )


def check_padding(outputs: Callable[[Inputs], Tensor], inputs: Bundle) -> bool:
    """Whether the model gives outputs for each position of texts, rather than some for each text.

    The shortest text is evaluated in its own length and padded to the longest.

    Args:
        outputs: Gives the outputs of inputs in their own shape.
        inputs: The texts.

    Raises:
        ValueError: If the outputs of a text depend on its padding, or their number on the length of the text in another
            way than by its positions.
    """
    lengths = inputs[MASK].ne(0).sum(dim=1)
    row = int(lengths.argmin())
    padded = inputs.map(lambda x: x[row : row + 1]).padded(inputs.length)
    padded = padded.like(padded, positional=None)
    short = padded.trimmed()
    if short.positions == padded.positions:
        z = outputs(short.like(short, length=short.positions))
        return z.dim() > 2 and z.shape[1] == short.positions
    alone = outputs(short.like(short, length=short.positions))
    with_padding = outputs(padded)
    if alone.shape == with_padding.shape:
        positional = False
    elif alone.dim() > 2 and alone.shape[1] == short.positions:
        positional, with_padding = True, with_padding[:, : short.positions]
    else:
        raise ValueError(
            f"model: gives outputs of shape {tuple(alone.shape)} for a text of {short.positions} positions, and "
            f"{tuple(with_padding.shape)} if it is padded to {padded.positions}. Texts of different lengths need "
            "outputs (N, T, ...) with three dimensions or more, or as many for each text; pass output= a function that "
            "gives them, for instance output=lambda out: out.start_logits.unsqueeze(-1)."
        )
    exact = 1e-3 if alone.dtype == torch.float32 else 1e-6
    apart = float((alone - with_padding).abs().max())
    if not apart <= exact * max(1.0, float(alone.abs().max())) and bool(alone.isfinite().all()):
        raise ValueError(
            f"model: the outputs of a text change by {apart:.3g} if it is padded, so they would depend on the texts "
            f"that are evaluated beside it. Does the model, or output=, use the {MASK!r}? A callable output gets the "
            "inputs as its second argument."
        )
    return positional
