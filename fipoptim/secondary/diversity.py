"""The likeness of a network to others, by the gradients of their losses with respect to the inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipoptim.anchors.evaluation import device_of, evaluation, unwrap
from fipoptim.anchors.output_space import read_logits
from fipoptim.secondary.arguments import (
    LossFunction,
    checked_loss,
    checked_loss_function,
    checked_module,
)
from fipoptim.secondary.batches import EndlessBatches


class Diversity:
    r"""Likeness of the input gradients to those of reference networks. Minimised, it makes the network different.

    The value is the mean over a batch and over the references of the cosine

    .. math:: \cos\bigl(\nabla_x \ell(f(x; w), y),\; \nabla_x \ell(f_{ref}(x), y)\bigr),

    between -1 and 1. An attack that is made on a reference follows the reference's input gradient, so it transfers
    less to a network whose gradients are less aligned with these. The cosine counts as 0 if either gradient vanishes,
    as for inputs that are classified with a margin beyond rounding. All networks are evaluated in eval mode, without
    autocast, and left in the mode they were in.

    Args:
        model: The network that is optimized.
        references: One network or several. They are copied at once, so later changes of them do not matter, and
            ``model`` itself may be given, as the network that it is now.
        batches: A DataLoader or any iterable of ``(x, y)`` pairs that can be iterated more than once; see
            :class:`TaskLoss`. ``x`` is one float tensor (N, ...) with N inputs, at least one.
        loss_fn: Takes the output and ``y`` and returns a scalar that is a sum or mean over the inputs.

    Raises:
        TypeError: If an argument has the wrong type. When called, if ``x`` is not a float tensor, or if the loader
            yields something that is not a pair.
        ValueError: If there is no reference. When called, if the loader yields nothing, if a batch holds no input, if
            the loss is not a scalar, or if it does not depend on the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        references: nn.Module | Sequence[nn.Module],
        batches: Iterable[Any],
        loss_fn: LossFunction = F.cross_entropy,
    ) -> None:
        modules: list[nn.Module]
        if isinstance(references, nn.Module) or not isinstance(references, Iterable):
            modules = [references]
        else:
            modules = list(references)
        if not modules:
            raise ValueError("references: is empty; give at least one network to differ from.")
        for module in modules:
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"references: must be torch.nn.Modules, got {type(module).__name__}; "
                    "load weights into a module first."
                )
        self.model = checked_module("model", model)
        self.references = tuple(copy.deepcopy(unwrap(m)).requires_grad_(False) for m in modules)
        self.loss_fn = checked_loss_function(loss_fn)
        self._endless_batches = EndlessBatches("batches", batches)

    def __call__(self) -> Tensor:
        """The mean cosine on the next batch, a scalar with a graph to the model's parameters."""
        model = unwrap(self.model)
        device = device_of(model)
        x, y = self._endless_batches.next_pair(device)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"batches: x must be one float tensor, which has an input gradient; got {got}."
            )
        if x.numel() == 0 or x.dim() == 0:
            raise ValueError(
                f"batches: x must hold at least one input along dimension 0, got shape {tuple(x.shape)}."
            )
        for reference in self.references:
            if device_of(reference) != device:
                reference.to(device)  # The model has been moved.
        gradient = self._input_gradient(model, x, y, create_graph=torch.is_grad_enabled())
        cosines = [
            _row_cosines(gradient, self._input_gradient(reference, x, y, create_graph=False))
            for reference in self.references
        ]
        return torch.cat(cosines).mean()

    def _input_gradient(self, model: nn.Module, x: Tensor, y: Any, *, create_graph: bool) -> Tensor:
        """The gradient of the loss with respect to each input, flattened: (N, d)."""
        x = x.detach().requires_grad_()
        # Tangents ask for attention kernels that can be differentiated twice.
        with torch.enable_grad(), evaluation(model, x.device, tangents=True):
            # The model gets a copy, because it may write to its input, which a leaf does not allow.
            loss = checked_loss(self.loss_fn(read_logits(model(x.clone())), y))
            if not loss.requires_grad:
                raise ValueError(
                    "loss_fn: its value must depend on the inputs through autograd; it is detached from them."
                )
            (gradient,) = torch.autograd.grad(
                loss, x, create_graph=create_graph, materialize_grads=True
            )
        return gradient.reshape(len(x), -1)


def _row_cosines(a: Tensor, b: Tensor) -> Tensor:
    """The cosines between the rows of ``a`` and ``b``, both (N, d), as (N,). A cosine is 0 if either row is zero."""
    # Rows are divided by their largest entry first, since gradients of well-classified inputs are small enough to
    # underflow. The derivative of a cosine grows as its row shrinks, and must not overflow: smaller rows count as zero.
    sizes = [v.detach().abs().amax(dim=1, keepdim=True) for v in (a, b)]
    least = torch.finfo(a.dtype).tiny / torch.finfo(a.dtype).eps
    nonzero = ((sizes[0] > least) & (sizes[1] > least)).flatten()
    # Zero rows are left out before the division, so that their derivative is 0 and not NaN.
    u, v = (x[nonzero] / size[nonzero] for x, size in zip((a, b), sizes, strict=True))
    cosines = F.cosine_similarity(u, v, dim=1)
    return a.new_zeros(len(a)).index_put((nonzero.nonzero().flatten(),), cosines)
