"""The networks whose metric is looked at: a file each, and a line each in the registry below."""

from __future__ import annotations

from recipes.spectrum.networks.minilm import MiniLM
from recipes.spectrum.networks.network import Network
from recipes.spectrum.networks.resnet import ResNet20
from recipes.spectrum.networks.two_tasks import CNN, Digits

NETWORKS: dict[str, type[Network]] = {}


def register(name: str, network: type[Network]) -> None:
    """Adds a network under the name that the command line knows it by.

    Raises:
        ValueError: If there is a network of that name.
    """
    if name in NETWORKS:
        raise ValueError(f"name: a network {name!r} is registered already.")
    NETWORKS[name] = network


register("digits", Digits)
register("cnn", CNN)
register("resnet20", ResNet20)
register("minilm-lora", MiniLM)
