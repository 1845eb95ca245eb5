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
    """A network with inputs for it.

    Attributes:
        name: What tables call it.
        build: Makes the network; parameters that require no gradient are not optimized.
        draw: Draws n inputs.
        batch: Anchors, and inputs of the new task, in one step.
        classes: Outputs of the network.
    """

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[int], Tensor]
    batch: int
    classes: int

    def make(self, seed: int, device: torch.device) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
        """The seeded network in eval mode, anchors, new inputs and new labels."""
        torch.manual_seed(seed)
        model = self.build().eval()
        anchors, new = self.draw(self.batch), self.draw(self.batch)
        labels = torch.randint(self.classes, (self.batch,))
        return model.to(device), anchors.to(device), new.to(device), labels.to(device)


class Transformer(nn.Module):
    """A text classifier for tokens ``(n, 32)``: six encoder layers, 11 million parameters."""

    def __init__(self, classes: int = 10, width: int = 384, vocabulary: int = 1000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, 6, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(n, classes)``."""
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)).mean(dim=1))
        return logits


class LowRank(nn.Module):
    """Adds a product of rank r to a weight (Hu et al., LoRA)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / rank)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return weight + self.b @ self.a


def adapted_transformer(rank: int = 8) -> Transformer:
    """The transformer with adapters on all its linear layers, and only those to be optimized."""
    model = Transformer().requires_grad_(False)
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(
                module, "weight", LowRank(module.weight, rank), unsafe=True
            )
    return model


def tokens(n: int) -> Tensor:
    """Random tokens ``(n, 32)``."""
    return torch.randint(1000, (n, 32))


def images(*shape: int) -> Callable[[int], Tensor]:
    """Draws random images of ``shape``."""
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
