"""The parts of ``recipes.quantize``: rounding in a layer, weights that move on a grid, statistics, packing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from quantize_cases import small_cnn

from fipoptim.secondary.grid import largest_integer, nearest_on_grid
from recipes.common.batch_statistics import by_batch
from recipes.common.data import load_task
from recipes.common.layer_inputs import input_gram, layers_of
from recipes.quantize.export import packed, unpacked
from recipes.quantize.held_outputs import HeldOutputs
from recipes.quantize.inputs import draw_images
from recipes.quantize.layer_rounding import rounded
from recipes.quantize.settings import QuantizeSettings
from recipes.quantize.statistics import with_carried_statistics
from recipes.quantize.straight_through import RoundedWeights


@given(st.integers(2, 8), st.integers(0, 40))
def test_packed_integers_come_back(bits, count):
    most = largest_integer(bits)
    integers = torch.randint(-most, most + 1, (count,), dtype=torch.int8)
    stored = packed(integers, bits)
    assert stored.numel() == -(-count * bits // 8)
    assert torch.equal(unpacked(stored, bits, count), integers)


def test_a_gram_gives_the_change_of_a_layers_outputs():
    model, x = small_cnn(), torch.randn(7, 1, 8, 8)
    for layer, inputs in ((model[3], model[:3](x)), (model[7], model[:7](x))):
        gram = input_gram(model, layer, x.split(3))
        change = torch.randn_like(layer.weight)
        moved = copy.deepcopy(layer).requires_grad_(False)
        moved.weight += change
        D = change.flatten(1).double()
        squared = (moved(inputs) - layer(inputs)).square().sum()
        torch.testing.assert_close((D @ gram * D).sum().float(), squared, rtol=1e-4, atol=1e-4)
    assert list(layers_of(model)) == ["0", "3", "7"]


def test_the_errors_of_a_layer_are_made_good_by_least_squares():
    torch.manual_seed(0)
    x = (torch.randn(50, 4) @ torch.randn(4, 4)).double()
    weight, gram = torch.randn(2, 4), x.T @ x
    found = rounded(weight, gram, 3, damping=1e-12)
    order = gram.diagonal().argsort(descending=True)
    on_grid, w = found.grid.weights().double(), weight.double()
    for k in range(4):
        done, left = order[:k], order[k:]
        # Of all values of the columns that are left, those that restore the outputs best.
        missing = x[:, done] @ (w - on_grid)[:, done].T
        best = w[:, left] + torch.linalg.lstsq(x[:, left], missing).solution.T
        torch.testing.assert_close(found.before[:, order[k]].double(), best[:, 0])
    # Rounding the values before by themselves gives the grid.
    scales = found.grid.scales[:, None]
    integers = (found.before / scales).round().clamp(-3, 3)
    assert torch.equal(integers.to(torch.int8), found.grid.integers)


def test_inputs_that_say_nothing_of_each_other_leave_plain_rounding():
    weight, sizes = torch.randn(3, 5), torch.rand(5, dtype=torch.float64) + 0.1
    found = rounded(weight, sizes.diag(), 3, damping=1e-12)
    nearest = nearest_on_grid(weight, 3, sizes.expand(3, 5))
    assert torch.equal(found.grid.integers, nearest.integers)
    assert torch.equal(found.grid.scales, nearest.scales)


def test_statistics_are_carried_over():
    dense, batches = small_cnn(), torch.randn(60, 1, 8, 8).split(20)
    same = with_carried_statistics(by_batch(dense), dense, batches)
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], tensor)
    # Weights of any other size give the same network again.
    scaled = by_batch(dense)
    with torch.no_grad():
        scaled[0].weight *= torch.tensor([3.0, 0.5, 2.0, 1.5]).view(4, 1, 1, 1)
    shipped = with_carried_statistics(scaled, dense, batches)
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(shipped(x), dense(x), rtol=1e-3, atol=1e-4)
    assert torch.equal(shipped[0].weight, scaled[0].weight)


def test_what_is_held_is_measured_relative_to_its_size():
    model, x = small_cnn(), torch.randn(30, 1, 8, 8)
    factors = HeldOutputs.factors_of(model, ["2", "5"], 4.0, x)
    held = HeldOutputs(copy.deepcopy(model), ["2", "5"], 4.0, factors)
    row = held(x)
    parts = [model(x), model[:3](x).flatten(1), model[:6](x).flatten(1)]
    assert row.shape == (30, sum(p.shape[1] for p in parts))
    # The variance of the rows is 1 for the softened logits and 1 for the two layers together.
    variances = [p.var(dim=0, correction=0).sum() for p in row.split([3, 256, 36], dim=1)]
    torch.testing.assert_close(torch.stack(variances), torch.tensor([1.0, 0.5, 0.5]))
    softened = 8 * (parts[0] / 4).softmax(dim=1).sqrt()
    torch.testing.assert_close(row[:, :3], factors[0] * softened)


def test_rounded_weights_move_and_stay_on_the_grid():
    model = small_cnn()
    before = copy.deepcopy(model)
    names = [f"{name}.weight" for name in layers_of(model)]
    free = {name: model.get_parameter(name).detach().clone() for name in names}
    scales = {name: nearest_on_grid(w, 3).scales for name, w in free.items()}
    weights = RoundedWeights(model, free, scales, 3)
    for k, name in zip((0, 3, 7), names, strict=True):
        torch.testing.assert_close(model[k].weight, nearest_on_grid(free[name], 3).weights())
    x = torch.randn(4, 1, 8, 8)
    F.mse_loss(model(x), before(x)).backward()
    numbers = model[7].parametrizations.weight.original
    scale = scales["7.weight"][:, None]
    copied = copy.deepcopy(before)
    for name in names:
        copied.get_parameter(name).data.copy_(nearest_on_grid(free[name], 3).weights())
    F.mse_loss(copied(x), before(x)).backward()
    # Straight through: the derivative by a free number is that by the weight, times the scale.
    inside = (free["7.weight"] / scale).abs() <= 3
    torch.testing.assert_close(numbers.grad, copied[7].weight.grad * scale * inside)
    found = weights.finish()
    assert model.state_dict().keys() == before.state_dict().keys()
    for k, name in zip((0, 3, 7), names, strict=True):
        torch.testing.assert_close(model[k].weight, found[name].weights())


@pytest.mark.parametrize("views", [1, 3])
def test_all_methods_get_the_same_images(views):
    task = load_task("digits")
    settings = QuantizeSettings(anchors=40, views=views)
    images = draw_images(task, settings, 5)
    assert torch.equal(images, draw_images(task, settings, 5))
    assert images.shape == (40 * views, 1, 8, 8)
    rows = {tuple(row.tolist()) for row in task.train_inputs.flatten(1)}
    assert all(tuple(row.tolist()) in rows for row in images[:40].flatten(1))
    assert len(draw_images(task, QuantizeSettings(anchors=None), 0)) == len(task.train_inputs)
