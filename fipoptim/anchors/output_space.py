"""The space in which the model's outputs are compared: what "the same output" means.

A network's function is preserved up to some notion of distance between outputs. An output space maps what
the model returns to a tensor ``z`` in which that distance is Euclidean, so that the metric of weight space is
``g = (1/N) sum_i J_i^T J_i`` with ``J_i = dz_i/dw`` (Eq. 2 of the paper, averaged over the anchors).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fipoptim.anchors.bundle import MASK, mask_of
from fipoptim.anchors.refusals import check_width

# Gets what the model returns, or also the inputs of the same rows.
OutputMap = Callable[..., Tensor]


def read_logits(output: Any) -> Tensor:
    """The tensor in a model's output: itself, or what a dict or ``ModelOutput`` holds at ``logits``.

    Raises:
        TypeError: If the output is neither a tensor nor carries one at ``logits``.
    """
    return _read(output, ("logits",))


def _read(output: Any, names: tuple[str, ...]) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in names:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise TypeError(
        f"model: its output must be a float tensor, or carry one at {' or '.join(map(repr, sorted(names)))}; got "
        f"{type(output).__name__}. Pass output=f with a function that picks the tensor to preserve."
    )


def logits(output: Any) -> Tensor:
    """The outputs as they are: the Euclidean metric of the paper's Eq. 2.

    A model without a head, whose output carries no ``logits``, gives its ``last_hidden_state``.
    """
    return _read(output, ("logits", "last_hidden_state"))


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

    The class with the largest score is predicted, the first of equal ones. A single score predicts class 1 if it is
    positive, else class 0.
    """
    scores = classes_last(z)
    if scores.shape[-1] == 1:
        return (scores > 0).squeeze(-1).long()
    return scores.argmax(dim=-1)


def nats_per_token(output: Any, inputs: Any) -> Tensor:
    r"""Probabilities of tokens, :math:`z = \sqrt{2 p / T}` with the number T of tokens of each text that count.

    :math:`\|\Delta z\|^2` is, to second order, the KL divergence of the next token's distribution in nats, averaged
    over the tokens of the text. Outputs ``(N, V)`` are of one token a text.
    """
    z = probabilities(output)
    mask = mask_of(inputs)
    if mask is not None and z.shape[:2] == mask.shape:
        tokens: Tensor = inputs[MASK].ne(0).sum(dim=1).clamp(min=1).to(z)
        return z / (2.0 * tokens).sqrt().reshape(-1, 1, 1)
    return z.div((2.0 * z.shape[1]) ** 0.5)


SPACES: dict[str, OutputMap] = {
    "logits": logits,
    "probabilities": probabilities,
    "nats_per_token": nats_per_token,
}


@dataclass(frozen=True)
class OutputSpace:
    """A map into an output space.

    Attributes:
        function: What it calls.
        takes_inputs: Whether the function gets the inputs beside what the model returns.
    """

    function: OutputMap
    takes_inputs: bool

    def __call__(self, output: Any, inputs: Any = None) -> Any:
        """The function's value: a tensor with one row an input, if it is right.

        Args:
            output: What the model returned.
            inputs: The inputs of the same rows, in the form that the model was called with.
        """
        return self.function(output, inputs) if self.takes_inputs else self.function(output)


def output_map(output: str | OutputMap) -> OutputSpace:
    """The map for ``output``: one of the names in :data:`SPACES`, or the callable itself.

    A callable gets the inputs as its second argument if two of its positional arguments have no default.

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
        output = SPACES[output]
    if not callable(output):
        raise TypeError(f"output: must be a name or a callable, got {type(output).__name__}.")
    needed = _needed_arguments(output)
    if needed > 2:
        raise TypeError(
            "output: must take one argument, what the model returns, or two, that and the inputs; got one with "
            f"{needed}."
        )
    return OutputSpace(output, needed == 2)


def _needed_arguments(function: OutputMap) -> int:
    """The number of positional arguments without a default; 1 if it is not known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


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
