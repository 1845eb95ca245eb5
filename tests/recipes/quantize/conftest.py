"""Fixtures of the tests of ``recipes.quantize``."""

from dataclasses import replace

import pytest

from recipes.quantize.networks import NETWORKS


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    """Lets the command line train dense networks for three epochs only."""
    for name, network in NETWORKS.items():
        epochs = None if network.epochs is None else 3
        monkeypatch.setitem(NETWORKS, name, replace(network, epochs=epochs))
