"""FIPOptimizer as torch's own optimizer cases build one: from bare parameters.

Those cases call ``optim_cls(params, lr=..., **options)`` with loose tensors and no model, while a
`FIPOptimizer` needs anchors, and anchors need a model. `BareFIPOptimizer` supplies both: a small
smooth model that owns exactly the parameters it was given, and a few fixed inputs to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, FIPOptimizer

N_ANCHORS = 3
N_INPUTS = 2
N_OUTPUTS = 2


class BareModel(nn.Module):
    """``(N, 2)`` inputs to ``(N, 2)`` outputs, a smooth function of every floating-point tensor given.

    Each tensor adds ``tanh(x F) tanh(p)`` with a fixed F made of cosines of integers, so that two
    models over equal tensors are the same function and no random number is drawn. The metric has a
    rank of at most 6: larger parameters leave a null space, scalar ones do not.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        for tensor in tensors:
            self._adopt(tensor)
        floating = [p for p in self.parameters() if p.is_floating_point()]
        if not floating:  # the optimizer should raise the error, and not the anchors
            self.spare = nn.Parameter(torch.ones(1))
            floating = [self.spare]
        dtype = torch.float32
        for p in floating:
            dtype = torch.promote_types(dtype, p.dtype)
        self.compute_dtype = dtype
        self.compute_device = floating[0].device

    def _adopt(self, tensor: Tensor) -> str:
        # The tensor bypasses register_parameter, which refuses a plain leaf tensor that torch.optim accepts.
        name = f"p{len(self._parameters)}"
        self._parameters[name] = tensor  # type: ignore[assignment]
        return name

    def adopt_without_changing_the_function(self, tensor: Tensor) -> None:
        """Own one more tensor. Its contribution is measured from its present value, so the function does not change."""
        name = self._adopt(tensor)
        self.register_buffer(f"{name}_start", tensor.detach().clone())

    def owns(self, tensor: Tensor) -> bool:
        return any(tensor is p for p in self.parameters())

    def anchor_inputs(self) -> Tensor:
        count = torch.arange(N_ANCHORS * N_INPUTS, dtype=self.compute_dtype)
        return torch.sin(count + 1).reshape(N_ANCHORS, N_INPUTS).to(self.compute_device)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x), N_OUTPUTS)
        for index, (name, p) in enumerate(self._parameters.items()):
            if p is None or not p.is_floating_point() or p.layout is not torch.strided:
                continue
            count = torch.arange(1, N_INPUTS * N_OUTPUTS * p.numel() + 1, dtype=x.dtype)
            mix = torch.cos(0.7 * count + index).reshape(N_INPUTS, -1).to(x.device)
            features = torch.tanh(x @ mix).reshape(len(x), N_OUTPUTS, p.numel())
            value = torch.tanh(p.to(x).flatten())
            start = self._buffers.get(f"{name}_start")
            if start is not None:
                value = value - torch.tanh(start.to(x).flatten())
            total = total + (features @ value) / math.sqrt(max(1, p.numel()))
        return total


def _materialize(params: Any) -> Any:
    """`params` with generators turned into lists, so that they can be read twice; all else unchanged."""
    if isinstance(params, (Tensor, set)) or params is None:
        return params
    listed = list(params)
    for i, entry in enumerate(listed):
        if isinstance(entry, dict) and not isinstance(entry["params"], (Tensor, set)):
            listed[i] = {**entry, "params": list(entry["params"])}
    return listed


def _tensors(params: Any) -> Iterator[Tensor]:
    """Every tensor in `params`, in any form that torch.optim accepts."""
    if isinstance(params, Tensor):
        yield params
    elif isinstance(params, dict):
        yield from _tensors(params["params"])
    elif isinstance(params, tuple) and len(params) == 2 and isinstance(params[0], str):
        yield params[1]
    elif isinstance(params, (list, set)):
        for entry in params:
            yield from _tensors(entry)


class BareFIPOptimizer(FIPOptimizer):
    """`FIPOptimizer(params, anchors, ...)` from `params` alone; `lr` is another name for `eps`.

    The constructor's step length is `eps`, and it becomes every group's ``lr``: what torch's cases
    pass as ``lr=`` is therefore `eps`. A group's own ``lr`` is passed through untouched.

    Args:
        params: As in torch.optim: tensors, groups, named parameters, generators of those.
        lr: The step length; the optimizer's own default when absent.
        **options: Passed to `FIPOptimizer`.
    """

    def __init__(self, params: Any, lr: Any = None, **options: Any) -> None:
        if lr is not None:
            if "eps" in options:
                raise TypeError("give the step length once, as lr or as eps")
            options["eps"] = lr
        params = _materialize(params)
        model = BareModel({id(p): p for p in _tensors(params)}.values())
        super().__init__(params, AnchorBatch(model, model.anchor_inputs()), **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        anchors = getattr(self, "anchors", None)
        if anchors is not None and isinstance(param_group, dict):
            param_group = _materialize([param_group])[0]
            for tensor in _tensors(param_group):
                if not anchors.model.owns(tensor):
                    anchors.model.adopt_without_changing_the_function(tensor)
        super().add_param_group(param_group)
