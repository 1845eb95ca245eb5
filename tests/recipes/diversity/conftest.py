"""Fixtures of the tests of ``recipes.diversity``: the digits, a start network, and test images."""

import pytest
from diversity_cases import INFO, SETTINGS

from recipes.common.data import load_task
from recipes.common.networks import digits_mlp
from recipes.diversity.training import train_network


@pytest.fixture(scope="session")
def task():
    return load_task("digits")


@pytest.fixture(scope="session")
def start(task):
    return train_network(digits_mlp, task, SETTINGS.changed(epochs=20), augment=None, seed=0)


@pytest.fixture(scope="session")
def images(task):
    return INFO.pixels(task.test_inputs[:100]), task.test_labels[:100]
