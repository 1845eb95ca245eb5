"""Adapters of PEFT: the parameters to give to a FIPOptimizer, in the precision that it asks for."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


def trainable_parameters(model: PeftModel) -> list[nn.Parameter]:
    """The trainable parameters of a PEFT model: adapters, and what ``modules_to_save`` trains whole.

    Call it before the :class:`~fipoptim.AnchorBatch` is built. PEFT keeps the adapters of a bfloat16 network in
    float32, but leaves the ``modules_to_save`` in bfloat16, which :class:`~fipoptim.FIPOptimizer` refuses. These are
    changed to float32 here, and from then on widen what they get, so that no autocast is needed.

    Adapters that are merged into the network have no effect of their own, and would not be trained. From now on, a
    forward pass in train mode raises a ``RuntimeError`` while some are merged.

    Args:
        model: The result of ``get_peft_model`` or ``PeftModel.from_pretrained(..., is_trainable=True)``.

    Raises:
        TypeError: If it is no PEFT model.
        ValueError: If adapters are merged, or nothing is trainable.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"model: must be a PeftModel, got {type(model).__name__}; give the result of get_peft_model(...)."
        )
    if _merged(model):
        raise ValueError(
            "model: its adapters are merged into the network; call model.unmerge_adapter() first."
        )
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for module in wrapper.modules_to_save.values():
                if any(p.requires_grad and p.dtype in _HALF for p in module.parameters()):
                    module.float()
                    module.register_forward_pre_hook(_widen)
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise ValueError(
            "model: nothing is trainable; load adapters with is_trainable=True, and none in inference mode."
        )
    model.register_forward_pre_hook(_refuse_merged)
    return found


def _merged(model: nn.Module) -> list[str]:
    """The names of layers whose adapters are merged."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and module.merged
    ]


def _refuse_merged(model: nn.Module, args: tuple[Any, ...]) -> None:
    if model.training and (merged := _merged(model)):
        raise RuntimeError(
            f"model: the adapters of {len(merged)} layers are merged (first {merged[0]!r}), and a step would not train "
            "them; call model.unmerge_adapter() before the next step."
        )


def _widen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.dtype in _HALF else x for x in args)
