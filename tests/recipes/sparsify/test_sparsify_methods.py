"""The pruning methods reach exactly the sparsity asked for, and read only the data that they may."""

from dataclasses import replace

import pytest
import torch
from sparsify_cases import NAMES, SETTINGS, TOTAL, small_cnn
from torch import nn

from recipes.common.augment import augmentation
from recipes.common.data import load_task
from recipes.common.features import WithFeatures, softened
from recipes.common.networks import digits_mlp, resnet20
from recipes.sparsify.dense import Dense
from recipes.sparsify.features import (
    deviations,
    distance,
    feature_modules,
    joined,
)
from recipes.sparsify.methods import METHODS
from recipes.sparsify.pruning import sparsify as prune
from recipes.sparsify.pruning import total_steps
from recipes.sparsify.scores import layered_magnitude


def test_softened_outputs_measure_fisher_distance_and_have_finite_derivatives():
    z = torch.tensor([[1.0, -2.0, 0.5], [900.0, -900.0, 0.0]], requires_grad=True)
    out = softened(4.0)(z)
    torch.testing.assert_close(out.square().sum(1), torch.full((2,), 64.0))  # |2 T √p|² = 4 T²
    torch.testing.assert_close(out[0], 8 * (z[0] / 4).softmax(0).sqrt())
    out.sum().backward()
    assert bool(torch.isfinite(z.grad).all())


def test_layered_magnitude_is_lamp():
    weight = torch.tensor([[3.0, -1.0], [2.0, 0.0]])
    expected = torch.tensor([[1.0, 1 / 14], [4 / 13, 0.0]])
    torch.testing.assert_close(layered_magnitude(weight), expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_arrives_at_exactly_the_sparsity(method, digits, dense):
    before = {k: v.clone() for k, v in dense.model.state_dict().items()}
    steps = []
    run = prune(
        method,
        dense,
        digits,
        [0.5, 0.95],
        SETTINGS,
        augment=None,
        seed=3,
        progress=lambda n, text: steps.append(n),
    )
    assert sum(steps) == total_steps(method, digits, [0.5, 0.95], SETTINGS)
    for network, sparsity in zip(run.networks, (0.5, 0.95), strict=True):
        metrics = network.metrics()
        assert metrics["total"] == TOTAL
        assert metrics["nonzero"] == TOTAL - round(sparsity * TOTAL)
        assert sum(int((network.state[n] != 0).sum()) for n in NAMES) == metrics["nonzero"]
        plain = digits_mlp()
        plain.load_state_dict(network.state)
        right = (plain(digits.test_inputs).argmax(1) == digits.test_labels).double().mean()
        assert 100 * float(right) == pytest.approx(network.accuracy)
    assert all(torch.equal(v, before[k]) for k, v in dense.model.state_dict().items())
    on_path = [run.path[k] for k in run.positions] if method == "fip" else []
    for flat, network in zip(on_path, run.networks, strict=False):
        assert torch.equal(flat, torch.cat([network.state[n].flatten() for n in NAMES]))
    again = prune(method, dense, digits, [0.5, 0.95], SETTINGS, augment=None, seed=3)
    for a, b in zip(run.networks, again.networks, strict=True):
        assert all(torch.equal(a.state[k], b.state[k]) for k in a.state)


def test_the_path_reaches_the_sparsity_in_a_single_step(digits, dense):
    settings = SETTINGS.changed(epochs=1, batch_size=len(digits.train_inputs))
    run = prune("fip", dense, digits, [0.5, 0.9], settings, augment=None, seed=0)
    assert [n.zeros for n in run.networks] == [TOTAL // 2, round(0.9 * TOTAL)]


@pytest.mark.parametrize(
    "options",
    [{}, {"products": 2}, {"products": "adaptive"}, {"restore": 8}, {"hold_features": True}],
    ids=str,
)
def test_the_path_reads_no_label(options, digits, dense):
    settings = SETTINGS.changed(epochs=2, eps=1.5, batch_size=128, **options)
    shuffled = replace(digits, train_labels=digits.train_labels.flip(0))
    runs = [
        prune("fip", dense, task, [0.9], settings, augment=None, seed=0).networks[0]
        for task in (digits, shuffled)
    ]
    assert all(torch.equal(runs[0].state[k], runs[1].state[k]) for k in runs[0].state)
    assert runs[0].accuracy > 60  # the function is learnt from outputs of the dense network alone


def test_mirror_images_become_anchors_without_more_steps(digits, dense):
    settings = SETTINGS.changed(mirror=True, epochs=1)
    for method in ("fip", "gradual-distillation"):
        run = METHODS[method](dense, digits, settings, augment=None, seed=0)
        n = len(digits.train_inputs)
        assert torch.equal(run.inputs.images[n:], run.inputs.images[:n].flip(3))
        with torch.no_grad():
            assert torch.allclose(run.reference, dense.model(run.inputs.images), atol=1e-5)
        steps = total_steps(method, digits, [0.9], settings)
        plain = settings.changed(mirror=False)
        assert steps == total_steps(method, digits, [0.9], plain)
    labelled = METHODS["gradual"](dense, digits, settings, augment=None, seed=0)
    assert len(labelled.inputs.images) == n  # training with labels adds no mirror images


def test_the_path_with_labels_reads_them(digits, dense):
    settings = SETTINGS.changed(labels=True, epochs=1)
    shuffled = replace(digits, train_labels=digits.train_labels.flip(0))
    runs = [
        prune("fip", dense, task, [0.9], settings, augment=None, seed=0).networks[0]
        for task in (digits, shuffled)
    ]
    assert not torch.equal(runs[0].state["1.weight"], runs[1].state["1.weight"])


def test_the_path_works_with_few_augmented_anchors_per_layer_sparsity_and_dense_layers(
    digits, dense
):
    settings = SETTINGS.changed(
        anchors=30,
        augment="all",
        per_layer=True,
        keep=("5",),
        products="adaptive",
        eps=1.0,
    )
    run = prune("fip", dense, digits, [0.75], settings, augment=augmentation("digits"), seed=0)
    (network,) = run.networks
    assert network.per_layer == {"1.weight": 0.75, "3.weight": 0.75}
    assert bool((network.state["5.weight"] != 0).all())


def test_the_path_ships_batch_norm_with_the_statistics_of_its_inputs():
    torch.manual_seed(0)
    task = load_task("digits")
    task = replace(task, train_inputs=task.train_inputs[:64], train_labels=task.train_labels[:64])
    model = small_cnn()
    settings = SETTINGS.changed(autocast=True, augment="all", batch_size=32)
    run = prune(
        "fip", Dense(model, None), task, [0.8], settings, augment=augmentation("digits"), seed=0
    )
    (network,) = run.networks
    assert network.zeros == round(0.8 * (72 + 288 + 640))
    plain = small_cnn()
    plain.load_state_dict(network.state)
    plain.eval()
    seen: list[torch.Tensor] = []
    plain[0].register_forward_hook(lambda module, given, output: seen.append(output))
    plain(task.train_inputs)
    mean = torch.cat(seen).mean(dim=(0, 2, 3))
    spread = torch.cat(seen).std(dim=(0, 2, 3))
    # Shifted views of the same inputs gave the statistics: they are near those of the inputs.
    assert bool(((plain[1].running_mean - mean).abs() < 0.2 * spread).all())


def test_features_are_held_in_units_of_their_deviation():
    torch.manual_seed(0)
    model, moved = small_cnn().eval(), small_cnn().eval()
    inputs = torch.randn(6, 1, 8, 8)
    before, after = WithFeatures(model, ["2", "0"]), WithFeatures(moved, ["2", "0"])
    scales = deviations(before, inputs)
    assert scales == pytest.approx([float(f.std()) for f in before(inputs)[1:]])
    space = joined(softened(4.0), scales, 3.0)
    apart = (space(after(inputs)) - space(before(inputs))).square().sum(dim=1).mean()
    (z, *features), (reference, *those) = after(inputs), before(inputs)
    outputs = (softened(4.0)(z) - softened(4.0)(reference)).square().sum(dim=1).mean()
    torch.testing.assert_close(apart, outputs + 3 * distance(features, those, scales))
    torch.testing.assert_close(z, moved(inputs))
    assert not moved[2]._forward_hooks


def test_features_are_the_outputs_of_blocks_or_of_activations():
    assert feature_modules(resnet20()) == [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3)]
    assert feature_modules(digits_mlp()) == ["2", "4"]
    with pytest.raises(ValueError, match="neither residual blocks nor activations"):
        feature_modules(nn.Linear(2, 2))
