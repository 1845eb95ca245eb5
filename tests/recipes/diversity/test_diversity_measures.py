"""Measures of ensembles, against values computed by hand on small cases."""

import math

import pytest
import torch
from torch import nn

from recipes.diversity.measures import Votes, activation_norms, coherence, diversity_scores


def test_the_accuracies_of_votes_equal_those_counted_by_hand():
    votes = Votes(torch.tensor([0, 1, 1, 0]))
    votes.add(torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.1, 0.9]]))  # predictions 0 1 0 1
    votes.add(torch.tensor([[0.4, 0.6], [0.4, 0.6], [0.1, 0.9], [0.2, 0.8]]))  # predictions 1 1 1 1
    assert votes.accuracies == [50.0, 50.0]
    assert votes.mean == 50.0
    assert votes.joint == 75.0  # joint predictions 0 1 1 1
    assert votes.disagreement == 50.0


def test_activation_norms_and_their_deviation_equal_those_computed_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU())
    images = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 1.0]]]])
    norms = []
    for scale in (1.0, 3.0):
        model[1].weight.data = scale * torch.eye(2)
        norms.append(activation_norms(model, images))
    assert torch.allclose(norms[0], torch.tensor([[5.0, 1.0]]))
    # The mean of the standard deviations of (5, 15) and (1, 3), with n - 1.
    expected = (10 / math.sqrt(2) + 2 / math.sqrt(2)) / 2
    assert diversity_scores(norms) == [pytest.approx(expected)]


def test_coherence_of_a_network_with_itself_is_one_and_with_its_opposite_minus_one():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    opposite = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    opposite[1].weight.data = -model[1].weight.data
    x, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 0, 1, 1])
    assert torch.allclose(coherence(model, model, x, y), torch.ones(5).double())
    assert torch.allclose(coherence(model, opposite, x, y), -torch.ones(5).double())


def test_coherence_of_certain_predictions_is_known_and_without_gradient_zero():
    sure = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    sure[1].weight.data = torch.tensor([[20.0, 0, 0, 0], [-20.0, 0, 0, 0]])
    x, y = torch.ones(1, 1, 2, 2), torch.tensor([0])
    assert coherence(sure, sure, x, y).item() == pytest.approx(1.0)
    sure[1].weight.data *= 1e4  # softmax is exactly 1
    assert coherence(sure, sure, x, y).item() == 0.0
