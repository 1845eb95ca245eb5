"""The nearest network on a grid against brute force, its export, and what QuantizedProjection refuses."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import flat_weights, small_net, two_layers
from torch import nn

from fipoptim import AnchorBatch, AnchorMetric
from fipoptim.secondary import QuantizedProjection
from fipoptim.secondary.grid import integers_at, largest_integer, nearest_on_grid

channel = st.lists(
    # There are few distinct values, zero among them, so that ties are common.
    st.sampled_from([0.0, -0.5, 0.5, 1.0, -1.0, 0.3, 2.0, 1.7, -3.25]) | st.floats(-4, 4, width=32),
    min_size=3,
    max_size=3,
)
weights = st.lists(st.floats(-4, 4, width=32), min_size=12, max_size=12)


def least_distance(values, h, bits, scales):
    """The smallest squared distance of one channel to the grids of the given scales, in float64."""
    w, h = (torch.tensor(v, dtype=torch.float64) for v in (values, h))
    most = largest_integer(bits)
    grid = scales[:, None] * (w / scales[:, None]).round().clamp(-most, most)
    return float((h * (w - grid).square()).sum(dim=1).min())


@given(channel, st.lists(st.floats(0.0625, 4, width=32), min_size=3, max_size=3), st.integers(2, 4))
def test_no_scale_is_better_than_the_one_that_is_found(values, h, bits):
    scales = torch.linspace(1e-3, 5, 20_000, dtype=torch.float64)
    found = nearest_on_grid(torch.tensor([values]), bits, torch.tensor([h]))
    on_grid = found.integers[0].double() * found.scales[0].double()
    distance = float(
        (torch.tensor(h).double() * (torch.tensor(values).double() - on_grid).square()).sum()
    )
    # The brute force can miss the best scale by half a step; then the distance is larger, not smaller.
    assert distance <= least_distance(values, h, bits, scales) + 1e-6
    assert int(found.integers.abs().max()) <= largest_integer(bits)


@given(weights, st.sampled_from([2, 3, 8]))
def test_the_distance_is_that_of_the_projection(values, bits):
    model = two_layers(values)
    projection = QuantizedProjection(model, bits)
    before, distance = flat_weights(model), projection.distance()
    found = projection.project_()
    moved = float((flat_weights(model) - before).norm())
    assert distance == pytest.approx(moved, rel=1e-4, abs=1e-6)
    assert projection.distance() <= 1e-5
    for name, grid in found.items():
        assert grid.integers.dtype == torch.int8
        assert grid.scales.dtype == torch.float32
        assert torch.equal(grid.weights(), model.get_parameter(name))


@given(weights)
def test_gradient_points_to_the_projection(values):
    model = two_layers(values)
    projection = QuantizedProjection(model, 2)
    projection().backward()
    grad = torch.cat([layer.weight.grad.flatten() for layer in model]).double()
    before = flat_weights(model)
    projection.project_()
    # w - grad/2 is the nearest network: one gradient step lands on it.
    torch.testing.assert_close(before - grad / 2, flat_weights(model), rtol=1e-5, atol=1e-6)
    assert model[0].bias.grad is None


def test_the_gradient_is_that_of_a_difference_quotient():
    torch.manual_seed(0)
    model = two_layers(torch.randn(12).tolist()).double()
    h = {"0.weight": torch.rand(2, 3) + 0.1, "1.weight": torch.rand(3, 2) + 0.1}
    projection = QuantizedProjection(model, 3, weighting=h)
    projection().backward()
    weight, step = model[0].weight, 1e-4
    for index in ((0, 0), (1, 2)):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * step
                sides.append(float(projection()))
                weight[index] -= sign * step
        quotient = (sides[0] - sides[1]) / (2 * step)
        assert float(weight.grad[index]) == pytest.approx(quotient, rel=1e-3, abs=1e-5)


def test_ternary_weights_by_hand():
    # {1, 1.2} share the scale 1.1 and 0.1 goes to zero; the second channel needs no rounding.
    found = nearest_on_grid(torch.tensor([[1.0, -1.2, 0.1], [3.0, 0.0, 3.0]]), 2)
    assert found.integers.tolist() == [[1, -1, 0], [1, 0, 1]]
    torch.testing.assert_close(found.scales, torch.tensor([1.1, 3.0]))


def test_weights_that_count_more_are_met_more_closely():
    row = torch.tensor([[1.0, 0.6, 0.6]])
    assert nearest_on_grid(row, 2).scales.item() == pytest.approx(2.2 / 3)
    h = torch.tensor([[1000.0, 1.0, 1.0]])
    assert nearest_on_grid(row, 2, h).scales.item() == pytest.approx(1.0, abs=1e-3)


def test_channels_of_zeros_and_channels_that_do_not_count():
    w = torch.tensor([[0.0, 0.0], [1.0, 0.9], [1e-30, -1e-30], [1e30, 1e30]])
    found = nearest_on_grid(w, 2, torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
    torch.testing.assert_close(found.scales, torch.tensor([1.0, 0.95, 1e-30, 1e30]))
    assert found.integers.tolist() == [[0, 0], [1, 1], [1, -1], [1, 1]]


def test_given_scales_are_kept():
    found = integers_at(torch.tensor([[0.4, 0.6, -9.0]]), torch.tensor([0.5]), 3)
    assert found.integers.tolist() == [[1, 1, -3]]
    assert found.scales.tolist() == [0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_types_come_back_bit_for_bit(dtype):
    model = small_net().to(dtype)
    biases = model[0].bias.clone()
    found = QuantizedProjection(model, 4).project_()
    for name, grid in found.items():
        assert torch.equal(grid.weights(dtype), model.get_parameter(name))
    assert torch.equal(model[0].bias, biases)


def test_more_bits_are_nearer_and_a_schedule_may_lower_them():
    projection = QuantizedProjection(small_net(), 8)
    distances = []
    for bits in (8, 4, 3, 2):
        projection.bits = bits
        distances.append(projection.distance())
    assert distances == sorted(distances)
    assert distances[0] < 0.02 * distances[-1]


def test_weighting_by_the_metrics_diagonal():
    model = small_net().eval()
    metric = AnchorMetric(AnchorBatch(model, torch.randn(16, 4)), list(model.parameters()))
    projection = QuantizedProjection(model, 2, weighting=metric)
    diagonal = dict(zip(metric.names, metric.unflatten(metric.diagonal()), strict=True))
    squares = [
        (diagonal[name] * (model.get_parameter(name) - grid.weights()).square()).sum()
        for name, grid in projection.integers().items()
    ]
    torch.testing.assert_close(projection(), torch.stack(squares).sum())


def test_what_is_quantized():
    model = small_net()
    assert QuantizedProjection(model, 4).names == ("0.weight", "4.weight")
    projection = QuantizedProjection(model, 4, keep="0")
    assert projection.names == ("4.weight",)
    assert projection.total == 15
    before = copy.deepcopy(model.state_dict())
    projection.project_()
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert changed == ["4.weight"]


def test_parameters_may_be_replaced_but_not_be_gone():
    model = small_net()
    projection = QuantizedProjection(model, 2)
    model[0].weight = nn.Parameter(torch.full((5, 4), 3.0))
    assert projection.integers()["0.weight"].scales.tolist() == [3.0] * 5
    del model[0].weight
    with pytest.raises(ValueError, match="to be quantized is gone.*new QuantizedProjection"):
        projection()


@pytest.mark.parametrize("bits", [True, "4", None, 4.0, [4], torch.tensor(True)])
def test_bits_that_are_no_whole_number_are_refused(bits):
    with pytest.raises(TypeError, match="bits: must be a whole number, got"):
        QuantizedProjection(small_net(), bits)


@pytest.mark.parametrize("bits", [1, 9, 0, -3])
def test_bits_out_of_range_are_refused(bits):
    projection = QuantizedProjection(small_net(), np.int64(4))
    with pytest.raises(ValueError, match="bits: must be from 2 to 8, got"):
        projection.bits = bits
    assert projection.bits == 4


def test_other_arguments_that_are_refused():
    model = small_net()
    with pytest.raises(TypeError, match=r"model: must be a torch\.nn\.Module"):
        QuantizedProjection(model.state_dict(), 4)
    with pytest.raises(TypeError, match="keep: must be names"):
        QuantizedProjection(model, 4, keep=3)
    with pytest.raises(ValueError, match="nothing is left to quantize"):
        QuantizedProjection(model, 4, keep=["0", "4"])
    with pytest.raises(ValueError, match=r"lacks \['4\.weight'\].*to be quantized"):
        QuantizedProjection(model, 4, weighting={"0.weight": torch.ones(5, 4)})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_projected(bad):
    model = two_layers([float(i) for i in range(1, 13)])
    with torch.no_grad():
        model[1].weight[0, 0] = bad
    before = flat_weights(model)
    projection = QuantizedProjection(model, 2)
    with pytest.raises(ValueError, match=r"model: 1\.weight holds NaN or infinite"):
        projection.project_()
    torch.testing.assert_close(flat_weights(model), before, rtol=0, atol=0, equal_nan=True)
