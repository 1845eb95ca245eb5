"""Weights held at zero: the outputs of the network, and the view of an optimizer and the metric."""

import torch
from sparsify_cases import NAMES, some_masks

from fipoptim import AnchorBatch, AnchorMetric
from recipes.common.networks import digits_mlp, resnet20
from recipes.sparsify.masks import MaskedWeights


def test_held_weights_are_zero_and_stay_there():
    model = digits_mlp()
    kept = some_masks(model)
    held = MaskedWeights(model, NAMES)
    held.hold(kept)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 1, 8, 8)).square().sum().backward()
        optimizer.step()
    state = held.state()
    for name in NAMES:
        assert bool((state[name][~kept[name]] == 0).all())
        assert not bool(torch.signbit(state[name][~kept[name]]).any())  # no negative zeros
        assert bool((state[name][kept[name]] != 0).any())
        assert torch.equal(held.masks[name], kept[name])


def test_the_state_loads_into_the_plain_model_and_computes_the_same():
    model, inputs = resnet20().eval(), torch.randn(2, 3, 32, 32)
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    before = model(inputs)
    held = MaskedWeights(model, names)
    torch.testing.assert_close(model(inputs), before)
    held.hold({n: torch.rand(p.shape) > 0.3 for n, p in held.parameters.items()})
    plain = resnet20().eval()
    plain.load_state_dict(held.state())
    torch.testing.assert_close(plain(inputs), model(inputs))


def test_other_weights_can_be_put_in():
    model, other = digits_mlp(), digits_mlp().state_dict()
    kept = some_masks(model)
    held = MaskedWeights(model, NAMES)
    held.hold_only(kept, other)
    for name, tensor in held.state().items():
        assert torch.equal(
            tensor,
            tensor.new_zeros(()).where(~kept[name], other[name]) if name in NAMES else other[name],
        )


def test_the_diagonal_of_the_metric_is_zero_for_held_weights():
    model = digits_mlp()
    kept = some_masks(model)
    held = MaskedWeights(model, NAMES)
    held.hold(kept)
    metric = AnchorMetric(AnchorBatch(model, torch.randn(5, 1, 8, 8)))
    diagonal = dict(zip(metric.names, metric.unflatten(metric.diagonal(4)), strict=True))
    for name in NAMES:
        part = diagonal[MaskedWeights.inner_name(name)]
        assert bool((part[~held.masks[name]] == 0).all())
        assert bool((part[held.masks[name]] > 0).any())
