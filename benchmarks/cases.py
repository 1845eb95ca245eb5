"""The networks and inputs that every benchmark measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recipes.common.networks import lenet_300_100, narrow_resnet18, paper_cnn, resnet20


@dataclass(frozen=True)
class Case:
    """A network and random inputs for it.

    Attributes:
        name: The name of the case in tables.
        build: Returns a new network; its parameters that require no gradient are not optimized.
        draw: Returns ``n`` random inputs, shape ``(n, ...)``.
        batch: The number of anchors in one step, and also the number of inputs of the new task.
        classes: The number of outputs of the network.
    """

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[int], Tensor]
    batch: int
    classes: int

    def make(self, seed: int, device: torch.device) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
        """Builds the network and draws its data, all from one seed.

        Args:
            seed: The seed of the weights, inputs and labels.
            device: The device of everything returned.

        Returns:
            The network in eval mode; the anchors ``(batch, ...)``; the inputs of the new task ``(batch, ...)``; and
            the labels of these inputs ``(batch,)``.
        """
        torch.manual_seed(seed)
        model = self.build().eval()
        anchors, new = self.draw(self.batch), self.draw(self.batch)
        labels = torch.randint(self.classes, (self.batch,))
        return model.to(device), anchors.to(device), new.to(device), labels.to(device)


class Transformer(nn.Module):
    """A text classifier for tokens ``(n, 32)``, with six encoder layers and 11 million parameters."""

    def __init__(self, classes: int = 10, width: int = 384, vocabulary: int = 1000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, 6, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits ``(n, classes)`` of tokens ``(n, length)``."""
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)).mean(dim=1))
        return logits


class LowRank(nn.Module):
    """A parametrization that adds a trainable matrix of rank ``rank`` to a frozen weight (Hu et al., LoRA)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / rank)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the adapted weight, in the shape of ``weight``."""
        return weight + self.b @ self.a


def adapted_transformer(rank: int = 8) -> Transformer:
    """Returns the transformer with low-rank adapters on its linear encoder layers; only the adapters are optimized."""
    model = Transformer().requires_grad_(False)
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(
                module, "weight", LowRank(module.weight, rank), unsafe=True
            )
    return model


def tokens(n: int) -> Tensor:
    """Returns random tokens ``(n, 32)``."""
    return torch.randint(1000, (n, 32))


def images(*shape: int) -> Callable[[int], Tensor]:
    """Returns a function of n that draws random images ``(n, *shape)``."""
    return lambda n: torch.randn(n, *shape)


CASES = (
    Case("LeNet-300-100, 20 anchors", lenet_300_100, images(1, 28, 28), 20, 10),
    Case("LeNet-300-100", lenet_300_100, images(1, 28, 28), 500, 10),
    Case("CNN", paper_cnn, images(1, 28, 28), 100, 20),
    Case("CNN, 500 anchors", paper_cnn, images(1, 28, 28), 500, 20),
    Case("ResNet-20", resnet20, images(3, 32, 32), 100, 10),
    Case("narrow ResNet-18", narrow_resnet18, images(3, 32, 32), 100, 100),
    Case("transformer", Transformer, tokens, 32, 10),
    Case("transformer, adapters", adapted_transformer, tokens, 32, 10),
)
