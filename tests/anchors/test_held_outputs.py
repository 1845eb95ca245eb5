"""Anchors on which only some outputs are held."""

import pytest
import torch
from torch import nn

from fipoptim import AnchorBatch
from fipoptim.anchors.held_outputs import HeldOutputs, augmented, with_ranges


def test_outputs_in_the_range_are_those_of_the_model_and_others_are_the_fill():
    model, x = nn.Linear(3, 4), torch.randn(5, 3)
    z = HeldOutputs(model)(*with_ranges(x, (1, 3)))
    torch.testing.assert_close(z[:, 1:3], model(x)[:, 1:3])
    assert not z[:, [0, 3]].any()
    assert (HeldOutputs(model, fill=-9.0)(*with_ranges(x, (1, 3)))[:, [0, 3]] == -9).all()


def test_each_input_may_have_its_own_outputs():
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    held = torch.tensor([[True, False, True], [False, True, False]])
    z, own = HeldOutputs(model)(x, held), model(x)
    torch.testing.assert_close(z[held], own[held])
    assert not z[~held].any()


def test_outputs_that_are_not_held_do_not_drift_while_the_head_grows():
    head = nn.Linear(3, 2)
    model = nn.Sequential(nn.Linear(3, 3), head)
    x, held = torch.randn(6, 3), torch.tensor([[True, True, False, False]]).repeat(6, 1)
    anchors = AnchorBatch(HeldOutputs(model, width=4, fill=-100.0), (x, held))
    grown = nn.Linear(3, 4)
    with torch.no_grad():
        grown.weight[:2], grown.bias[:2] = head.weight, head.bias
        grown.bias[2:] = 50.0  # of all outputs these are the largest
    model[1] = grown
    assert anchors.drift() == pytest.approx(0, abs=1e-10)
    assert anchors.predictions_kept() == 1
    with torch.no_grad():
        grown.bias[0] += 2
    assert anchors.drift() == pytest.approx(4, rel=1e-5)


def test_a_head_beyond_the_width_is_refused():
    with pytest.raises(ValueError, match="width: the model has 4 outputs, got 3"):
        HeldOutputs(nn.Linear(2, 4), width=3)(*with_ranges(torch.randn(1, 2), (0, 2)))


def test_augmented_views_keep_what_is_held():
    x, held = torch.arange(2.0).view(2, 1), torch.tensor([[0, 1], [1, 2]])
    views, of_views = augmented(lambda x: torch.cat([x, x + 10]))((x, held))
    assert views.flatten().tolist() == [0, 1, 10, 11]
    assert of_views.tolist() == [[0, 1], [1, 2], [0, 1], [1, 2]]
