r"""The gradient :math:`b = \nabla L` of the secondary objective, from the closure, the secondary loss or ``.grad``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.sharded import ShardedFunction
from fipoptim.metric.parameters import parameter_names
from fipoptim.parameters import Groups, StepParameters, all_params
from fipoptim.shards import local


@dataclass(frozen=True)
class SecondaryGradient:
    """The gradient of the secondary objective in one step.

    Attributes:
        loss: The loss before the step; None if it is not known.
        parameters: The parameters that the step moves; none if the step is skipped.
        tensors: The gradient, one tensor a parameter; None for L = 0.
    """

    loss: Any
    parameters: StepParameters
    tensors: list[Tensor] | None


def secondary_gradient(
    groups: Groups,
    closure: Callable[[], Any] | None,
    secondary: Callable[[], Tensor] | None,
    anchors: AnchorBatch,
) -> SecondaryGradient:
    """Take the gradient, in this order: from the closure, from ``secondary``, from ``.grad`` as it stands.

    Groups whose ``lr`` is 0 do not move. With several ranks the gradient of ``secondary`` is averaged over them, as
    DistributedDataParallel does with ``.grad``.

    Raises:
        RuntimeError: If the closure returns a loss and leaves no gradient, if the secondary loss is not a scalar that
            depends on the parameters, or if a gradient is sparse.
    """
    if closure is not None:
        return _of_closure(groups, closure, anchors)
    if secondary is not None:
        return _of_secondary(groups, secondary, anchors)
    if all(p.grad is None for p in all_params(groups)):
        return SecondaryGradient(None, _moved(groups, lambda p: p.requires_grad), None)
    return _as_it_stands(groups, None)


def _moved(groups: Groups, wanted: Callable[[Tensor], bool]) -> StepParameters:
    """The parameters that a step moves: those wanted, in groups whose ``lr`` is not 0."""
    return StepParameters.of_groups(groups, lambda g, p: float(g["lr"]) > 0 and wanted(p))


def _as_it_stands(groups: Groups, loss: Any) -> SecondaryGradient:
    parameters = _moved(groups, lambda p: p.grad is not None)
    gradients = [_dense(cast(Tensor, p.grad)) for p in parameters.originals]
    return SecondaryGradient(loss, parameters, gradients)


def _of_closure(
    groups: Groups, closure: Callable[[], Any], anchors: AnchorBatch
) -> SecondaryGradient:
    params = all_params(groups)

    def gradients() -> list[tuple[Tensor | None, int]]:
        return [(p.grad, 0 if p.grad is None else local(p.grad)._version) for p in params]

    before = gradients()
    with torch.enable_grad():
        loss = closure()
    changed = any(
        old is not new or version != now
        for (old, version), (new, now) in zip(before, gradients(), strict=True)
    )
    skipped = loss is None and not (changed and _any_gradient(params))
    if isinstance(anchors.function, ShardedFunction):  # of which a part may be zero
        skipped = anchors.ranks.every(skipped)
    if skipped:
        return SecondaryGradient(None, StepParameters.of_groups(groups, lambda g, p: False), None)
    if not changed:
        raise RuntimeError(
            "closure: it left no new gradient on any parameter; it must call loss.backward() "
            "and return the loss, or return None to skip a batch."
        )
    return _as_it_stands(groups, loss)


def _any_gradient(params: list[Tensor]) -> bool:
    """Whether any ``.grad`` is present and not zero."""
    return any(bool(local(p.grad).to_dense().any()) for p in params if p.grad is not None)


def _of_secondary(
    groups: Groups, secondary: Callable[[], Tensor], anchors: AnchorBatch
) -> SecondaryGradient:
    parameters = _moved(groups, lambda p: p.requires_grad)
    with torch.enable_grad():
        loss = _checked_loss(secondary())
    params, ranks = parameters.tensors, anchors.ranks
    if isinstance(anchors.function, ShardedFunction):
        names = parameter_names(anchors.model, parameters.originals)
        sums = anchors.function.gradients(loss, None, names)
        gradients = [x / ranks.size for x in sums]
        return SecondaryGradient(loss.detach(), parameters, gradients)
    found = torch.autograd.grad(loss, params, allow_unused=True) if params else ()
    if params and all(g is None for g in found):
        raise RuntimeError(
            "secondary: its loss depends on none of the parameters that this optimizer moves. "
            "Does it still hold the model that was optimized before a copy?"
        )
    # A parameter that the loss does not depend on may still move, to preserve the function.
    gradients = [
        torch.zeros_like(p) if g is None else _dense(g) for p, g in zip(params, found, strict=True)
    ]
    if params and not ranks.alone:
        total = ranks.sum_(parameters.flat.flatten(gradients)).div_(ranks.size)
        gradients = parameters.flat.unflatten(total)
    return SecondaryGradient(loss.detach(), parameters, gradients)


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise RuntimeError(f"secondary: must return a scalar loss tensor, got {got}.")
    if not loss.requires_grad:
        raise RuntimeError(
            "secondary: its loss does not depend on any parameter; compute it from the model, "
            "without detach() or no_grad()."
        )
    return loss.reshape(())


def _dense(gradient: Tensor) -> Tensor:
    if gradient.layout != torch.strided:
        raise RuntimeError(
            "gradient: is sparse; FIPOptimizer needs dense gradients (build embeddings with sparse=False)."
        )
    return local(gradient.detach())
