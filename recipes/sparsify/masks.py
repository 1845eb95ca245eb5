"""Weights held at zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class MaskedWeights:
    """The weights of a network that may be held at zero.

    Args:
        model: The network; its weights are changed in place.
        names: The parameters, as ``model.named_parameters()`` calls them.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        self.names = tuple(names)
        self.masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in self.parameters.items()}

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return {name: self.model.get_parameter(name) for name in self.names}

    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """Sets every weight to zero whose mask is False; :meth:`hold_again` does so behind a step."""
        self.masks = {name: masks[name] for name in self.names}
        self.hold_again()

    @torch.no_grad()
    def hold_again(self) -> None:
        """Sets the held weights to zero again, behind a step that moved them."""
        for name, parameter in self.parameters.items():
            parameter.masked_fill_(~self.masks[name], 0.0)  # a product would leave negative zeros

    @torch.no_grad()
    def hold_only(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Loads other ``weights`` (a state dict), then holds at zero those whose mask is False."""
        self.model.load_state_dict(weights)
        self.hold(masks)
