"""Stages: the sparsities that methods visit before those asked for, and the epochs of each."""

import itertools
import math

import pytest
import torch
from sparsify_cases import SETTINGS

from recipes.sparsify import tables
from recipes.sparsify.methods import METHODS
from recipes.sparsify.methods.lottery_ticket import ROUND, rounds
from recipes.sparsify.networks import NETWORKS
from recipes.sparsify.pruning import sparsify as prune
from recipes.sparsify.stages import stages

DEFAULTS = [list(network.sparsities) for network in NETWORKS.values()]


def test_a_lottery_ticket_round_prunes_no_more_than_its_share():
    sparsities = rounds([0.2, 0.9, 0.994])
    assert [r for r in sparsities if r in (0.2, 0.9, 0.994)] == [0.2, 0.9, 0.994]
    left = [1.0, *(1 - r for r in sparsities)]
    assert all(b / a >= 1 - ROUND - 1e-9 for a, b in itertools.pairwise(left))


@pytest.mark.parametrize(
    "asked",
    [[s] for s in (0.0, 0.3, 0.5, 0.9, 0.93, 0.95, 0.98, 0.994, 0.9999)]
    + [[0.5, 0.994], [0.9, 0.994], [0.2, 0.93, 0.98], [0.0, 0.999]],
)
def test_the_stages_are_short_enough_and_as_few_as_possible(asked):
    parts = stages(asked)
    assert [part[-1] for part in parts] == asked  # each part ends exactly at a sparsity asked for
    visited = [sparsity for part in parts for sparsity in part]
    assert visited == sorted(set(visited))
    here = 0.0
    for sparsity in visited:
        share = (sparsity - here) / (1 - here)
        assert sparsity <= 0.93 + 1e-9 or share <= 0.6 + 1e-9
        here = sparsity
    # There are as few stages as possible: with one less, some stage would be too long.
    begun = 0.0
    for part, wanted in zip(parts, asked, strict=True):
        least = max(
            1, math.ceil(math.log((1 - wanted) / min(1 - begun, 0.175)) / math.log(0.4) - 1e-9)
        )
        assert len(part) == least
        begun = wanted


def test_the_default_sparsities_need_no_further_stages():
    assert len(DEFAULTS) == 3
    for asked in DEFAULTS:
        assert stages(asked) == [[sparsity] for sparsity in asked]
    assert len(stages([0.994])[0]) == 4


def test_a_single_sparsity_is_reached_through_stages(digits, dense):
    settings = SETTINGS.changed(epochs=1)
    parts = stages([0.98])[0]
    assert len(parts) == 3
    seen = []
    alone, told, direct = (
        prune("fip", dense, digits, asked, how, augment=None, seed=0, progress=show)
        for asked, how, show in (
            ([0.98], settings, lambda n, text: seen.append(text)),
            (parts, settings, lambda n, text: None),
            ([0.98], settings.changed(waypoints=False), lambda n, text: None),
        )
    )
    assert [n.sparsity for n in alone.networks] == [0.98]  # waypoints are not reported
    assert all(
        torch.equal(t, told.networks[-1].state[k]) for k, t in alone.networks[0].state.items()
    )
    assert not torch.equal(
        alone.networks[0].state["1.weight"], direct.networks[0].state["1.weight"]
    )
    assert alone.positions == [len(alone.path) - 1]
    assert len(told.path) == len(alone.path) == 3 * (len(direct.path) - 1) + 1
    assert seen[0].startswith("1 of 3: ")
    assert seen[-1].startswith("3 of 3: 98.00% zeros")


def test_other_methods_get_as_many_epochs_as_the_stages_of_the_path():
    settings = SETTINGS.changed(epochs=5, baseline_epochs=8)
    for asked in ([0.994], [0.5, 0.994], [0.9, 0.95], *DEFAULTS):
        path = sum(leg.epochs for leg in METHODS["fip"].legs(asked, settings))
        count = sum(len(part) for part in stages(asked))
        assert path == 5 * count
        for method in METHODS:
            legs = METHODS[method].legs(asked, settings)
            assert [leg.sparsity for leg in legs if leg.asked] == asked
            if method == "layer-by-layer":
                assert sum(leg.epochs for leg in legs) == 0  # it takes no step
            elif method != "fip":
                assert sum(leg.epochs for leg in legs) >= 8 * count
        direct = settings.changed(waypoints=False)
        assert [leg.sparsity for leg in METHODS["fip"].legs(asked, direct)] == asked


def test_the_plan_lists_the_stages_and_epochs_of_every_method():
    settings = SETTINGS.changed(epochs=5, baseline_epochs=8)
    methods = ["fip", "gradual-distillation", "one-shot"]
    text = tables.plan(methods, [0.5, 0.98], settings, rewinds=True)
    rows = [" ".join(line.split()) for line in text.splitlines()[2:]]
    assert rows == [
        "invariant path 50, (91.51), (95.88), 98 4 x 5 = 20",
        "gradual, distilled 50, 98 32",
        "one-shot, labels 50, 98, each by itself 32",
    ]
