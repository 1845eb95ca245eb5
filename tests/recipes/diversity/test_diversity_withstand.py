"""The objective that keeps outputs from following attacks."""

import copy

import pytest
import torch
from diversity_cases import INFO

from recipes.common.networks import digits_mlp
from recipes.diversity.objectives.withstand import AttackDivergence


def divergence(model, start, task, **options):
    batches = [(task.train_inputs[:50], options.pop("labels", None))]
    others = options.pop("others", ())
    generator = torch.Generator().manual_seed(0)
    return AttackDivergence(
        model, start, others, batches, info=INFO, generator=generator, **{"eps": 0.2} | options
    )


def test_attack_divergence_is_measured_from_the_outputs_on_clean_images(start, task):
    model = digits_mlp()
    x = task.train_inputs[:50]
    p, q = start(x).softmax(1), model(x).softmax(1)
    expected = (p * (p / q).log()).sum(1).mean()
    found = divergence(model, start, task, eps=0.0)()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_attacks_on_the_start_network_change_its_own_outputs(start, task):
    assert divergence(start, start, task, eps=0.0)().item() == pytest.approx(0, abs=1e-6)
    attacked = divergence(start, start, task)
    assert sum(attacked().item() for _ in range(10)) > 0.5


def test_attack_divergence_reads_no_label_and_has_a_gradient_only_for_the_model(start, task):
    model, start = copy.deepcopy(start), copy.deepcopy(start)
    start.zero_grad()
    value = divergence(model, start, task)()
    assert value == divergence(model, start, task, labels="none of these")()
    value.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in start.parameters())


def test_attack_divergence_attacks_the_other_members_too(start, task):
    torch.manual_seed(1)
    alone = divergence(start, start, task)
    more = divergence(start, start, task, others=[digits_mlp()])
    # Attacks on an untrained network hardly change the outputs of the start network.
    assert sum(more().item() for _ in range(10)) < 0.8 * sum(alone().item() for _ in range(10))


def test_attacks_in_bfloat16_are_as_strong(start, task):
    objectives = [divergence(start, start, task, autocast=how) for how in (False, True)]
    full, half = (sum(o().item() for _ in range(10)) for o in objectives)
    assert half == pytest.approx(full, rel=0.1)
    assert half != full
