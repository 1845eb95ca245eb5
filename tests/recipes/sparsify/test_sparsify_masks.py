"""Weights held at zero stay there behind the steps of any optimizer."""

import torch
from sparsify_cases import NAMES, some_masks

from recipes.common.networks import digits_mlp
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
        held.hold_again()
    state = model.state_dict()
    for name in NAMES:
        assert bool((state[name][~kept[name]] == 0).all())
        assert not bool(torch.signbit(state[name][~kept[name]]).any())  # no negative zeros
        assert bool((state[name][kept[name]] != 0).any())
        assert torch.equal(held.masks[name], kept[name])


def test_other_weights_can_be_put_in():
    model, other = digits_mlp(), digits_mlp().state_dict()
    kept = some_masks(model)
    held = MaskedWeights(model, NAMES)
    held.hold_only(kept, other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(
            tensor,
            tensor.new_zeros(()).where(~kept[name], other[name]) if name in NAMES else other[name],
        )
