"""What a network computes on the way, and outputs softened by a temperature: what recipes hold with few images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn


def softened(temperature: float) -> Callable[[Tensor], Tensor]:
    r"""The output space :math:`2 T \sqrt{\text{softmax}(z / T)}`: the Fisher metric at a temperature."""

    def output(z: Tensor) -> Tensor:
        # This root, the exponential of half the logarithm, has a finite derivative even if a probability underflows.
        return 2 * temperature * (0.5 * (z.float() / temperature).log_softmax(dim=1)).exp()

    return output


class WithFeatures(nn.Module):
    """A network that returns its logits and the outputs of some of its modules.

    Args:
        model: The network, which stays as it is and is shared.
        names: The modules, as ``model.named_modules()`` calls them; each is called once in a forward pass.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The logits ``(n, classes)``, then the features of each module ``(n, ...)``."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            return lambda module, given, output: found.__setitem__(name, output)

        # The hooks live as long as the pass: a copy of the network has none.
        hooks = [
            self.model.get_submodule(name).register_forward_hook(keep(name)) for name in self.names
        ]
        try:
            logits = self.model(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return (logits, *(found[name] for name in self.names))
