"""The methods of ``recipes.quantize`` on a small network with batch norm."""

import copy

import pytest
import torch
from quantize_cases import small_cnn

from fipoptim.secondary.grid import largest_integer
from recipes.common.data import load_task
from recipes.common.networks import digits_mlp
from recipes.common.training import adam_one_cycle, minibatches, train
from recipes.quantize.methods import METHODS
from recipes.quantize.methods.distillation import DistillationOptions
from recipes.quantize.methods.method import Case
from recipes.quantize.methods.path import PathOptions
from recipes.quantize.settings import QuantizeSettings

SETTINGS = QuantizeSettings(
    batch_size=20,
    chunk_size=30,
    method_options=(
        PathOptions(steps=5, hold=("2", "5")),
        DistillationOptions(distillation_steps=5),
    ),
)


@pytest.fixture(scope="module")
def images():
    return torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def silent(steps, text):
    """Shows nothing."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 4])
def test_every_weight_is_on_its_grid_and_the_dense_network_is_left_alone(method, bits, images):
    dense = small_cnn().requires_grad_(False)
    before = copy.deepcopy(dense.state_dict())
    steps = []
    found = METHODS[method].run(
        Case(dense, images, bits, seed=0), SETTINGS, progress=lambda n, text: steps.append(n)
    )
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())
    assert set(found.grids) == {"0.weight", "3.weight", "7.weight"}
    state = found.model.state_dict()
    assert state.keys() == before.keys()
    for name, grid in found.grids.items():
        assert torch.equal(state[name], grid.weights())
        assert grid.integers.shape == state[name].shape
        assert int(grid.integers.abs().max()) <= largest_integer(bits)
        assert bool((grid.scales > 0).all())
    assert not found.model.training
    assert sum(steps) == METHODS[method].steps(SETTINGS, Case(dense, images, bits, 0))


def test_a_run_is_reproducible(images):
    case = Case(small_cnn().requires_grad_(False), images, 2, seed=3)
    one, other = (METHODS["fip"].run(case, SETTINGS, progress=silent) for _ in range(2))
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name])


def test_the_path_restores_what_rounding_layer_by_layer_has_changed():
    task = load_task("digits")
    torch.manual_seed(0)
    dense = digits_mlp()
    optimizer, scheduler = adam_one_cycle(dense, lr=5e-3, steps=60)
    batches = minibatches(task, batch_size=64, epochs=60 / 21, seed=0)
    train(dense, batches, optimizer, scheduler)
    dense = dense.eval().requires_grad_(False)
    images = task.train_inputs[:100]
    settings = QuantizeSettings(method_options=(PathOptions(steps=40, hold=("2", "4")),))
    drifts = {}
    for method in ("fip", "layerwise", "rounding"):
        found = METHODS[method].run(Case(dense, images, 2, seed=0), settings, progress=silent)
        with torch.no_grad():
            moved = found.model(task.test_inputs) - dense(task.test_inputs)
        drifts[method] = float(moved.square().sum(dim=1).mean())
    assert drifts["fip"] < 0.5 * drifts["layerwise"]
    assert drifts["layerwise"] < drifts["rounding"]


def test_methods_see_the_images_and_no_label():
    assert set(Case.__dataclass_fields__) == {"dense", "images", "bits", "seed"}
