"""The values of sparsity, weighting and names that SparseProjection accepts, and those that it refuses."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from small_networks import flat_weights, small_net, two_layers
from torch import nn

from fipoptim.secondary import SparseProjection


@pytest.mark.parametrize(
    "sparsity",
    [True, False, "0.5", None, 0.5j, [0.5], torch.tensor([0.1, 0.2]), torch.tensor(True)],
)
def test_a_sparsity_that_is_not_a_number_is_refused(sparsity):
    with pytest.raises(TypeError, match="sparsity: must be a number, got"):
        SparseProjection(small_net(), sparsity)
    projection = SparseProjection(small_net(), 0.25)
    with pytest.raises(TypeError, match="sparsity: must be a number, got"):
        projection.sparsity = sparsity
    assert projection.sparsity == 0.25


def test_a_sparsity_may_be_a_number_of_numpy_or_torch():
    for sparsity in (torch.tensor(0.5), np.float32(0.5), Fraction(1, 2)):
        projection = SparseProjection(small_net(), sparsity)
        assert type(projection.sparsity) is float
        assert projection.sparsity == 0.5
        assert projection.zeros == round(0.5 * 35)


def test_arguments_of_the_wrong_type():
    model = small_net()
    with pytest.raises(TypeError, match=r"model: must be a torch\.nn\.Module"):
        SparseProjection(model.state_dict(), 0.5)
    for keep in (3, [4], None):
        with pytest.raises(TypeError, match="keep: must be names of parameters or modules"):
            SparseProjection(model, 0.5, keep=keep)
    for weighting in (1.0, [torch.ones(5, 4)], torch.ones(35)):
        with pytest.raises(TypeError, match="weighting: must be None, an AnchorMetric or"):
            SparseProjection(model, 0.5, weighting=weighting)
    for h in (1.0, None, torch.ones(5, 4, dtype=torch.complex64)):
        with pytest.raises(TypeError, match=r"weighting: 0\.weight must be a tensor of real"):
            SparseProjection(model, 0.5, weighting={"0.weight": h, "4.weight": torch.ones(3, 5)})


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity: must be at least 0 and below 1"):
        SparseProjection(small_net(), sparsity)


def test_a_sparsity_that_leaves_no_weight_is_refused():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 1), nn.Linear(1, 2))
    assert SparseProjection(model, 0.8).zeros == round(0.8 * 422)
    with pytest.raises(ValueError, match=r"leave 2\.weight none of its 2 weights.*keep"):
        SparseProjection(model, 0.8, per_layer=True)
    projection = SparseProjection(model, 0.8, per_layer=True, keep="2")
    with pytest.raises(ValueError, match=r"leave 1\.weight none"):
        projection.sparsity = 0.99
    assert projection.sparsity == 0.8
    with pytest.raises(ValueError, match="leave the network none of its 422"):
        SparseProjection(model, 0.9999)


def test_unknown_names_and_names_that_leave_nothing_to_prune_are_refused():
    with pytest.raises(ValueError, match=r"keep: .*'4\.wight'.*choose from.*'4\.weight'"):
        SparseProjection(small_net(), 0.5, keep=["4.wight"])
    with pytest.raises(ValueError, match="nothing is left to prune"):
        SparseProjection(small_net(), 0.5, keep=["0", "4"])


def test_bad_weightings():
    model = small_net()
    good = {"0.weight": torch.ones(5, 4), "4.weight": torch.ones(3, 5)}
    with pytest.raises(ValueError, match=r"weighting: lacks \['4\.weight'\]"):
        SparseProjection(model, 0.5, weighting={"0.weight": torch.ones(5, 4)})
    with pytest.raises(ValueError, match=r"weighting: 4\.weight must have .*\(3, 5\), got \(15,\)"):
        SparseProjection(model, 0.5, weighting=good | {"4.weight": torch.ones(15)})
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"weighting: 4\.weight must be finite"):
            SparseProjection(model, 0.5, weighting=good | {"4.weight": torch.full((3, 5), bad)})


def test_nan_weights_are_not_projected():
    model = two_layers([float(i) for i in range(1, 13)])
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    before = flat_weights(model)
    with pytest.raises(ValueError, match=r"model: 1\.weight holds NaN"):
        SparseProjection(model, 0.5).project_()
    torch.testing.assert_close(flat_weights(model), before, rtol=0, atol=0, equal_nan=True)
