"""Weights held at zero: masks as torch parametrizations, so that every derivative stays within the sparse networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_ORIGINAL = ".parametrizations.{tensor}.original"


class _Mask(nn.Module):
    """Multiplies a weight by zeros and ones."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(like))
        self.mask: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class MaskedWeights:
    """The weights of a network that may be held at zero.

    Parametrized parameters replace the plain ones: the model computes with ``weight * mask``, and the derivative of
    that with respect to a masked weight is zero. Build optimizers after this.

    Args:
        model: The network; changed in place.
        names: The parameters, as ``model.named_parameters()`` calls them.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        self.names = tuple(names)
        self._masks: dict[str, _Mask] = {}
        for name in self.names:
            module_name, _, tensor = name.rpartition(".")
            module = model.get_submodule(module_name)
            mask = _Mask(getattr(module, tensor))
            parametrize.register_parametrization(module, tensor, mask)
            self._masks[name] = mask

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters behind the masks, under their plain names."""
        return {name: self.model.get_parameter(self.inner_name(name)) for name in self.names}

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks under the plain names: bool tensors, True for weights that are kept."""
        return {name: mask.mask > 0 for name, mask in self._masks.items()}

    @torch.no_grad()
    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """Sets every weight to zero whose mask is False, and holds it there."""
        for name, parameter in self.parameters.items():
            self._masks[name].mask.copy_(masks[name])
            parameter.mul_(self._masks[name].mask)

    @torch.no_grad()
    def hold_only(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Loads other ``weights`` (a plain state dict), then holds at zero those whose mask is False."""
        own = self._plain(dict(self.model.named_parameters()) | dict(self.model.named_buffers()))
        for name, tensor in own.items():
            tensor.copy_(weights[name])
        self.hold(masks)

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """A copy of the weights and buffers that loads into the plain model: held weights are exactly zero."""
        state = {k: v.detach().clone() for k, v in self._plain(self.model.state_dict()).items()}
        for name, mask in self._masks.items():
            # A product with the mask would leave negative zeros.
            state[name].masked_fill_(mask.mask == 0, 0.0)
        return state

    @staticmethod
    def inner_name(name: str) -> str:
        """The name by which ``named_parameters()`` now calls the parameter of that plain name."""
        module, _, tensor = name.rpartition(".")
        return module + _ORIGINAL.format(tensor=tensor)

    def _plain(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the plain model, under their plain names."""
        plain = {self.inner_name(name): name for name in self.names}
        masks = {self.inner_name(name).removesuffix("original") + "0.mask" for name in self.names}
        return {plain.get(k, k): v for k, v in tensors.items() if k not in masks}
