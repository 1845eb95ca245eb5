"""The networks of ``recipes.diversity`` and their defaults."""

import torch

from recipes.common.networks import vgg_small
from recipes.diversity.networks import NETWORKS
from recipes.diversity.settings import EnsembleSettings


def test_vgg_small_takes_photographs():
    assert vgg_small()(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_the_defaults_have_settings_that_can_be_built():
    for network in NETWORKS.values():
        assert isinstance(network.settings, EnsembleSettings)
        assert network.attacks.table_eps in network.attacks.attack_eps
