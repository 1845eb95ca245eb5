"""Fixtures of the tests of ``recipes.sparsify``: the digits, and briefly trained dense networks."""

from dataclasses import replace

import pytest

from recipes.common.data import load_task
from recipes.common.networks import digits_mlp
from recipes.sparsify.dense import train_dense
from recipes.sparsify.networks import NETWORKS


@pytest.fixture(scope="session")
def digits():
    return load_task("digits")


@pytest.fixture(scope="session")
def dense(digits):
    """Returns a briefly trained dense network."""
    return train_dense(
        digits_mlp, digits, epochs=4, batch_size=64, augment=None, autocast=False, seed=0
    )


@pytest.fixture
def short_dense(monkeypatch):
    """Lets the command line train dense networks for two epochs only."""
    for name, network in NETWORKS.items():
        monkeypatch.setitem(NETWORKS, name, replace(network, dense_epochs=2))
