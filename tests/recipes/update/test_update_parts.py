"""The parts of ``recipes.update``: the grown head, the division of the data, and the losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fipoptim import AnchorBatch
from recipes.common.data import load_task
from recipes.update.case import divide, make_case
from recipes.update.head import head_of, quiet_bias, with_more_classes
from recipes.update.methods.distillation import Distillation, DistillationOptions
from recipes.update.methods.ensemble import MeanOfProbabilities
from recipes.update.methods.focal import FocalDistillation, FocalOptions
from recipes.update.methods.interpolation import between
from recipes.update.setups import SETUPS


@pytest.fixture
def old():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5)).eval()


@pytest.fixture
def parts():
    return divide(load_task("digits"), 0.3, seed=1)


def rows(inputs):
    return {tuple(row.tolist()) for row in inputs.flatten(1)}


def test_a_grown_head_predicts_what_the_old_one_did(old):
    x = torch.randn(50, 1, 8, 8)
    z = old(x)
    grown = with_more_classes(old, 12, quiet_bias(z, 7))
    found = grown(x)
    torch.testing.assert_close(found[:, :5], z)
    # All new classes together are less likely than the old network's choice.
    p = found.softmax(dim=1)
    assert bool((p[:, 5:].sum(dim=1) < p[:, :5].amax(dim=1)).all())
    assert torch.equal(found.argmax(dim=1), z.argmax(dim=1))
    assert all(p.requires_grad for p in grown.parameters())
    assert head_of(old).out_features == 5


def test_a_new_class_that_overtakes_is_a_flip(old):
    x = torch.randn(40, 1, 8, 8)
    before = old(x).argmax(dim=1)
    grown = with_more_classes(old, 12, quiet_bias(old(x), 7))
    anchors = AnchorBatch(
        grown, x, reference=with_more_classes(old, 12, -math.inf), output="probabilities"
    )
    assert anchors.predictions_kept() == 1.0
    assert anchors.reference[:, 5:].abs().max() == 0
    with torch.no_grad():
        head_of(grown).bias[8] = float(old(x).amax(dim=1).median())
    now = grown(x).argmax(dim=1)
    overtaken = int((now == 8).sum())
    assert 0 < overtaken < 40
    assert int((now != before).sum()) == overtaken
    assert anchors.predictions_kept() == pytest.approx(1 - overtaken / 40)


def test_augmented_anchors_have_the_same_reference(old):
    x = torch.randn(10, 1, 8, 8)
    grown, reference = (with_more_classes(old, 8, bias) for bias in (-9.0, -math.inf))
    anchors = AnchorBatch(
        grown,
        x,
        reference=reference,
        output="probabilities",
        batch_size=6,
        augment=lambda inputs: inputs.flip(3),
        generator=torch.Generator().manual_seed(0),
    )
    sample = anchors.sample(0)
    expected = F.pad(2 * old(sample.inputs).softmax(dim=1).sqrt(), (0, 3))
    torch.testing.assert_close(sample.reference, expected)
    assert not rows(sample.inputs) & rows(x)


def test_no_held_out_input_is_trained_on(parts):
    assert parts.old.classes == 5
    assert parts.all.classes == 10
    assert int(parts.old.train_labels.max()) == int(parts.held_labels.max()) == 4
    held = rows(parts.held_inputs)
    assert not held & rows(parts.all.train_inputs)
    assert rows(parts.old.train_inputs) < rows(parts.all.train_inputs)
    everything = load_task("digits")
    assert rows(everything.train_inputs) == held | rows(parts.all.train_inputs)
    assert torch.equal(parts.all.test_labels, everything.test_labels)


def test_what_is_held_is_what_the_old_network_gets_right(old, parts):
    case = make_case(old, parts, None)
    for inputs, everything, labels in (
        (case.right, parts.old.train_inputs, parts.old.train_labels),
        (case.check, parts.held_inputs, parts.held_labels),
    ):
        right = old(everything).argmax(dim=1) == labels
        assert 0 < len(inputs) < len(labels)
        assert torch.equal(inputs, everything[right])


def test_the_losses_are_those_of_the_papers(old, parts):
    case = make_case(old, parts, None)
    x, labels = case.task.train_inputs[-350:-250], case.task.train_labels[-350:-250]
    x = torch.cat([x, case.task.train_inputs[:60]])
    labels = torch.cat([labels, case.task.train_labels[:60]])
    z = torch.randn(len(x), 10)
    settings = SETUPS["digits"].settings.completed([DistillationOptions, FocalOptions])
    settings = settings.changed(
        distillation_weight=0.7,
        distillation_temperature=2.0,
        focal_alpha=0.5,
        focal_beta=3.0,
        focal_temperature=1.0,
    )
    plain = F.cross_entropy(z, labels)
    distilled = focal = 0.0
    seen = set()
    for i in range(len(x)):
        if labels[i] >= 5:
            continue
        before = old(x[i : i + 1])[0].detach()
        apart = {}
        for t in (1.0, 2.0):
            p, q = (before / t).softmax(dim=0), (z[i] / t).softmax(dim=0)
            apart[t] = sum(float(p[k] * (p[k].log() - q[k].log())) for k in range(5))
        right = bool(before.argmax() == labels[i])
        seen.add(right)
        distilled += 0.7 * 4 * apart[2.0] / len(x)
        focal += (0.5 + 3.0 * right) * apart[1.0] / len(x)
    assert seen == {False, True}
    loss = Distillation().loss(case, settings)(x, z, labels)
    torch.testing.assert_close(loss, plain + distilled, rtol=1e-4, atol=1e-5)
    loss = FocalDistillation().loss(case, settings)(x, z, labels)
    torch.testing.assert_close(loss, plain + focal, rtol=1e-4, atol=1e-5)


def test_an_ensemble_averages_probabilities(old):
    x = torch.randn(6, 1, 8, 8)
    other = with_more_classes(old, 7, 1.0)
    z = MeanOfProbabilities(with_more_classes(old, 7, -math.inf), other)(x)
    expected = (F.pad(old(x).softmax(dim=1), (0, 2)) + other(x).softmax(dim=1)) / 2
    torch.testing.assert_close(z.softmax(dim=1), expected)
    assert math.isclose(float(z.exp().sum()), 6, rel_tol=1e-5)


def test_interpolation_begins_and_ends_with_its_two_networks():
    start, end = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    end.running_mean.fill_(4.0)
    end.num_batches_tracked.fill_(9)
    nn.init.constant_(end.weight, 3.0)
    half = between(start, end, 0.5)
    assert half.running_mean.tolist() == [2.0] * 3
    assert half.weight.tolist() == [2.0] * 3
    assert between(start, end, 1.0).weight.tolist() == [3.0] * 3
    assert start.weight.tolist() == [1.0] * 3
