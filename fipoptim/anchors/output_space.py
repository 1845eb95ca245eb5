"""The space in which the model's outputs are compared: what "the same output" means.

A network's function is preserved up to some notion of distance between outputs. An output space maps what
the model returns to a tensor ``z`` in which that distance is Euclidean, so that the metric of weight space is
``g = (1/N) sum_i J_i^T J_i`` with ``J_i = dz_i/dw`` (Eq. 2 of the paper, averaged over the anchors).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fipoptim.anchors.refusals import check_width

OutputMap = Callable[[Any], Tensor]


def read_logits(output: Any) -> Tensor:
    """The tensor in a model's output: itself, or what a dict or ``ModelOutput`` holds at ``logits``.

    Raises:
        TypeError: If the output is neither a tensor nor carries one at ``logits``.
    """
    if isinstance(output, Tensor):
        return output
    logits = (
        output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    )
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"model: its output must be a float tensor, or carry one at 'logits'; got "
            f"{type(output).__name__}. Pass output=f with a function that picks the tensor to preserve."
        )
    return logits


def logits(output: Any) -> Tensor:
    """The outputs as they are: the Euclidean metric of the paper's Eq. 2."""
    return read_logits(output)


def probabilities(output: Any) -> Tensor:
    r"""Square-root probabilities, :math:`z = 2\sqrt{\mathrm{softmax}(\text{logits})}`, ``(N, positions, classes)``.

    Their pull-back metric is the Fisher information of the categorical distribution, and
    :math:`\|\Delta z\|^2 = 4 \sum_k (\sqrt{p_k} - \sqrt{q_k})^2`, which is 8 times the squared Hellinger
    distance and to leading order ``2 KL``. :func:`classes_last` says which dimension holds the classes. A single logit,
    in outputs of shape ``(N, 1)`` or ``(N,)``, belongs to the second of two classes, whose probability is its sigmoid.
    """
    scores = read_logits(output)
    if not scores.is_floating_point() or scores.dim() == 0:
        return scores  # flatten_outputs() refuses it by name
    scores = _widened(classes_last(scores))
    if scores.shape[-1] == 1:
        scores = torch.cat([torch.zeros_like(scores), scores], dim=-1)
    # log_softmax, written without the terms of the largest score: these cancel up to rounding, which would be all that
    # is left of the derivative when a class is nearly certain.
    largest = scores.argmax(dim=-1, keepdim=True)
    below = (scores - scores.gather(-1, largest)).scatter(-1, largest, 0.0)
    others = below.exp().scatter(-1, largest, 0.0).sum(dim=-1, keepdim=True)
    # exp(log p / 2) rather than sqrt(p): the derivative stays finite when p underflows.
    return 2.0 * (0.5 * (below - others.log1p())).exp()


def classes_last(z: Tensor) -> Tensor:
    """``z`` with one row of class scores for each prediction, shape ``(N, positions, classes)``.

    Classes are in the last dimension of ``(N, C)`` and of ``(N, T, C)`` (tokens), and in dimension 1 of everything with
    four or more dimensions, such as feature maps ``(N, C, H, W)``, as for torch's losses. ``(N,)`` is one score an
    input.
    """
    if z.dim() == 1:
        z = z.unsqueeze(1)
    if z.dim() > 3:
        z = z.movedim(1, -1)
    return z.reshape(z.shape[0], z.shape[1:-1].numel(), z.shape[-1])


def predictions(z: Tensor) -> Tensor:
    """The class that each row of scores in ``z`` (see :func:`classes_last`) predicts, shape ``(N, positions)``.

    The largest score wins, and the first of equal ones. A single score predicts class 1 if it is positive, else 0.
    """
    scores = classes_last(z)
    if scores.shape[-1] == 1:
        return (scores > 0).squeeze(-1).long()
    return scores.argmax(dim=-1)


SPACES: dict[str, OutputMap] = {"logits": logits, "probabilities": probabilities}


def output_map(output: str | OutputMap) -> OutputMap:
    """The map for ``output``: one of the names in :data:`SPACES`, or the callable itself.

    Raises:
        ValueError: If ``output`` is an unknown name.
        TypeError: If ``output`` is neither a name nor callable.
    """
    if isinstance(output, str):
        if output not in SPACES:
            raise ValueError(
                f"output: got {output!r}; choose one of {sorted(SPACES)} or pass a callable "
                "that maps the model's output to a tensor with one row per input."
            )
        return SPACES[output]
    if not callable(output):
        raise TypeError(f"output: must be a name or a callable, got {type(output).__name__}.")
    return output


def flatten_outputs(z: Any, count: int) -> Tensor:
    """Check a mapped output of ``count`` inputs and flatten it to shape ``(count, m)``.

    Half-precision outputs are widened to float32; distances are not taken in half precision.

    Raises:
        TypeError: If ``z`` is not a real floating-point tensor.
        ValueError: If its first dimension is not ``count``, or if it is empty.
    """
    if not isinstance(z, Tensor) or not z.is_floating_point():
        got = f"a {z.dtype} tensor" if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(
            f"model: its output must be a real float tensor, got {got}. "
            "Pass output=f with a function that picks the float tensor to preserve."
        )
    if z.dim() == 0 or z.shape[0] != count or z.numel() == 0:
        raise ValueError(
            f"model: its output must have one row per anchor ({count}), got shape {tuple(z.shape)}."
        )
    rows: Tensor = z.reshape(count, -1)
    return _widened(rows)


def squared_distance(z: Tensor, reference: Tensor) -> Tensor:
    """:math:`‖z_i - z_{ref,i}‖²` for each anchor, shape ``(N,)``, of outputs ``(N, m)``.

    Raises:
        ValueError: If the outputs are of another width than the reference.
    """
    check_width(z, reference)
    return (z - reference.to(z.device)).square().sum(dim=1)


def _widened(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
