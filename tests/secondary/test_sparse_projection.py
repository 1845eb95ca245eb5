"""The nearest sparse network against brute force, and models whose parameters are replaced or moved."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given
from hypothesis import strategies as st
from small_networks import flat_weights, small_net, two_layers
from torch import nn

from fipoptim import AnchorBatch, AnchorMetric
from fipoptim.secondary import SparseProjection

weights = st.lists(
    # There are few distinct values, zero among them, so that ties are common.
    st.sampled_from([0.0, -0.5, 0.5, 1.0, -1.0, 1e-30, 2.0, 1e20, -3.25]),
    min_size=12,
    max_size=12,
)


@given(weights, st.floats(0.0, 0.95), st.booleans())
def test_projection_has_exactly_the_count_and_is_idempotent(values, sparsity, per_layer):
    if per_layer:
        sparsity = min(sparsity, 0.9)
    model = two_layers(values)
    biases = [model[0].bias.clone(), model[1].bias.clone()]
    projection = SparseProjection(model, sparsity, per_layer=per_layer)
    expected = 2 * round(sparsity * 6) if per_layer else round(sparsity * 12)
    before = flat_weights(model)
    masks = projection.masks()
    assert projection.zeros == expected
    assert sum(int((~mask).sum()) for mask in masks.values()) == expected

    returned = projection.project_()
    once = flat_weights(model)
    kept = torch.cat([mask.flatten() for mask in returned.values()])
    assert all(torch.equal(returned[name], masks[name]) for name in masks)
    assert torch.equal(once, torch.where(kept, before, 0.0))
    assert projection.distance() == 0.0
    assert torch.equal(model[0].bias, biases[0])
    assert torch.equal(model[1].bias, biases[1])

    projection.project_()
    assert torch.equal(flat_weights(model), once)


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=12, max_size=12),
    st.lists(st.floats(0, 4, width=32), min_size=12, max_size=12),
    st.integers(0, 4),
    st.booleans(),
)
def test_distance_is_that_to_the_nearest_of_all_sparse_networks(values, weighting, zeros, weighted):
    model = two_layers(values)
    h = torch.tensor(weighting) if weighted else torch.ones(12)
    projection = SparseProjection(
        model,
        zeros / 12,
        weighting={"0.weight": h[:6].view(2, 3), "1.weight": h[6:].view(3, 2)}
        if weighted
        else None,
    )
    squares = (h.double() * flat_weights(model).square()).tolist()
    nearest = min(sum(squares[i] for i in chosen) for chosen in combinations(range(12), zeros))
    assert float(projection()) == pytest.approx(nearest, rel=1e-5, abs=1e-30)
    assert projection.distance() == pytest.approx(math.sqrt(nearest), rel=1e-5, abs=1e-18)


@given(st.permutations(list(range(1, 13))), st.integers(0, 11))
def test_gradient_points_to_the_projection(sizes, zeros):
    model = two_layers([float(x) for x in sizes])
    projection = SparseProjection(model, zeros / 12)
    projection().backward()
    grad = torch.cat([layer.weight.grad.flatten() for layer in model]).double()
    before = flat_weights(model)
    projection.project_()
    # w - grad/2 is the nearest network: one gradient step lands on it.
    torch.testing.assert_close(before - grad / 2, flat_weights(model))
    assert model[0].bias.grad is None


def test_ties_drop_the_first():
    model = two_layers([1.0] * 12)
    masks = SparseProjection(model, 4 / 12).masks()
    assert masks["0.weight"].flatten().tolist() == [False] * 4 + [True] * 2
    assert masks["1.weight"].all()


def test_weights_too_small_to_square_are_still_told_apart():
    model = two_layers([2e-30] * 11 + [1e-30])
    assert not SparseProjection(model, 1 / 12).masks()["1.weight"][2, 1]


def test_weighting_by_the_metrics_diagonal():
    model = small_net().eval()
    inputs = torch.randn(16, 4)
    metric = AnchorMetric(AnchorBatch(model, inputs), list(model.parameters()))
    projection = SparseProjection(model, 0.5, weighting=metric)

    def outputs(*weights):
        named = {"0.weight": weights[0], "4.weight": weights[1]}
        return torch.func.functional_call(model, named, (inputs,))

    chosen = (model[0].weight.detach(), model[4].weight.detach())
    jacobians = torch.autograd.functional.jacobian(outputs, chosen)
    for name, jacobian in zip(["0.weight", "4.weight"], jacobians, strict=True):
        expected = jacobian.square().sum(dim=(0, 1)) / 16
        torch.testing.assert_close(projection.weighting[name], expected)
    scores = torch.cat(
        [(projection.weighting[f"{i}.weight"] * model[i].weight.square()).flatten() for i in (0, 4)]
    )
    torch.testing.assert_close(projection(), scores.sort().values[: projection.zeros].sum())


def test_weighting_can_be_replaced():
    model = two_layers([float(i) for i in range(1, 13)])
    projection = SparseProjection(model, 1 / 12)
    assert float(projection()) == 1.0
    projection.weighting = {
        "0.weight": torch.full((2, 3), 10.0),
        "1.weight": torch.full((3, 2), 0.1),
    }
    assert float(projection()) == pytest.approx(0.1 * 49)
    assert not projection.masks()["1.weight"][0, 0]


def test_schedule_raises_the_sparsity():
    model = two_layers([float(i) for i in range(1, 13)])
    projection = SparseProjection(model, 0.0)
    loss = projection()
    assert float(loss) == 0.0
    loss.backward()  # the loss has a graph even at a sparsity of zero, where a schedule may begin
    assert not model[0].weight.grad.any()
    for sparsity, expected in [(0.25, 3), (0.5, 6), (0.75, 9)]:
        projection.sparsity = sparsity
        projection.project_()
        assert int((flat_weights(model) == 0).sum()) == expected == projection.zeros


def test_prunable_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.conv = nn.Conv1d(4, 4, 3)
            self.norm = nn.LayerNorm(4)
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight
            self.frozen = nn.Linear(4, 4).requires_grad_(False)

    model = Tied()
    every = SparseProjection(model, 0.5)
    assert every.names == ("embed.weight", "conv.weight", "body.0.weight", "body.1.weight")
    assert every.total == 24 + 48 + 16 + 16
    assert SparseProjection(model, 0.5, keep=["head", "body.0"]).names == (
        "conv.weight",
        "body.1.weight",
    )
    assert SparseProjection(model, 0.5, keep="body").names == ("embed.weight", "conv.weight")


def test_replaced_parameters_are_followed():
    model = two_layers([float(i) for i in range(1, 13)])
    projection = SparseProjection(model, 1 / 12)
    model[0].weight = nn.Parameter(torch.full((2, 3), 0.5))
    assert float(projection()) == 0.25


def test_parameters_of_another_size_are_followed():
    model = two_layers([float(i) for i in range(1, 13)])
    projection = SparseProjection(model, 0.5)
    model[1] = nn.Linear(2, 5)
    assert projection.total == 16
    assert projection.zeros == 8
    projection.project_()
    assert int((flat_weights(model) == 0).sum()) == 8


def test_a_projection_whose_parameter_is_gone_raises():
    model = two_layers([float(i) for i in range(1, 13)])
    projection = SparseProjection(model, 0.5)
    torch.nn.utils.prune.identity(model[1], "weight")
    before = flat_weights(model)
    for use in (projection, projection.project_, projection.masks, lambda: projection.total):
        with pytest.raises(ValueError, match="model: a parameter that was to be pruned is gone"):
            use()
    assert torch.equal(flat_weights(model), before)


def test_a_weighting_that_does_not_fit_the_replaced_parameters_raises():
    model = two_layers([float(i) for i in range(1, 13)])
    weighting = {"0.weight": torch.ones(2, 3), "1.weight": torch.ones(3, 2)}
    projection = SparseProjection(model, 0.5, weighting=weighting)
    model[0].weight = nn.Parameter(torch.ones(1, 3))  # this shape would be broadcast
    before = flat_weights(model)
    for use in (projection, projection.project_, projection.masks):
        with pytest.raises(ValueError, match=r"weighting: 0\.weight .*\(1, 3\), got \(2, 3\)"):
            use()
    assert torch.equal(flat_weights(model), before)


def test_a_projection_follows_its_model_to_another_device():
    # The meta device stands for any other device.
    model = two_layers([float(i) for i in range(1, 13)])
    weighting = {"0.weight": torch.ones(2, 3), "1.weight": torch.ones(3, 2)}
    projection = SparseProjection(model, 0.0, weighting=weighting)
    model.to("meta")
    assert projection().device.type == "meta"
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0)
    assert float(projection()) == 0.0
    projection.sparsity = 0.5
    assert float(projection()) == 6 * 4.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_projected_without_overflow(dtype):
    values = [300.0 + 2 * i for i in range(12)]  # their squares overflow in float16
    model = two_layers(values).to(dtype)
    exact = sorted(v * v for v in flat_weights(model).tolist())
    projection = SparseProjection(model, 0.5)
    assert float(projection()) == pytest.approx(sum(exact[:6]), rel=1e-6)
    h = 1e6  # its square overflows too
    projection.weighting = {
        "0.weight": torch.full((2, 3), h),
        "1.weight": torch.full((3, 2), h),
    }
    assert float(projection()) == pytest.approx(h * sum(exact[:6]), rel=1e-6)
    assert sum(int((~mask).sum()) for mask in projection.masks().values()) == 6
    with pytest.raises(ValueError, match=r"weighting: 0\.weight must be finite"):
        projection.weighting = {
            name: torch.full_like(p, 1e300, dtype=torch.float64)
            for name, p in model.named_parameters()
        }
