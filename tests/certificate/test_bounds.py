"""Bounds of shares and means against their definitions, and how often they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fipoptim.bounds import corrected, inputs_needed, mean_of, share_of


def hits(count: int, number: int) -> torch.Tensor:
    return torch.arange(number) < count


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_the_bound_of_a_share_is_where_so_few_are_that_unlikely(
    number: int, part: float, confidence: float
) -> None:
    count = min(number, int(part * (number + 1)))
    share = share_of(hits(count, number), confidence)
    assert (share.count, share.inputs) == (count, number)
    assert share.rate == count / number <= share.bound
    if count == number:
        assert share.bound == 1.0
    else:  # Clopper and Pearson: the share at which so few, or fewer, have the probability 1 - confidence
        below = scipy.stats.binom.cdf(count, number, share.bound)
        assert below == pytest.approx(1 - confidence, rel=1e-6)


@pytest.mark.parametrize("rate", [0.002, 0.01, 0.05, 0.3])
def test_bounds_of_shares_hold_as_often_as_they_say_and_are_not_vacuous(rate: float) -> None:
    generator = np.random.default_rng(0)
    counts = generator.binomial(1000, rate, size=2000)
    of_count = {int(k): share_of(hits(int(k), 1000), 0.95).bound for k in set(counts)}
    bounds = np.array([of_count[int(k)] for k in counts])
    assert (bounds >= rate).mean() >= 0.95 - 2.5 * math.sqrt(0.05 * 0.95 / 2000)
    # Three standard deviations of the count and three inputs above the truth, on average.
    assert bounds.mean() <= rate + 3 * math.sqrt(rate / 1000) + 0.003


def test_corrected_bounds_hold_together() -> None:
    generator = np.random.default_rng(1)
    level = corrected(0.95, 10)
    assert level == pytest.approx(0.995)
    rates = np.linspace(0.01, 0.2, 10)
    counts = generator.binomial(200, rates, size=(1000, 10))
    of_count = {int(k): share_of(hits(int(k), 200), level).bound for k in np.unique(counts)}
    bounds = np.vectorize(lambda k: of_count[int(k)])(counts)
    assert (bounds >= rates).all(axis=1).mean() >= 0.94


def test_without_groups_nothing_is_corrected() -> None:
    assert corrected(0.95, 0) == corrected(0.95, 1) == pytest.approx(0.95)


@pytest.mark.parametrize(("share", "needed"), [(0.01, 299), (0.005, 598), (0.05, 59), (0.5, 5)])
def test_so_many_inputs_are_needed_and_no_fewer(share: float, needed: int) -> None:
    assert inputs_needed(share) == needed
    assert share_of(hits(0, needed), 0.95).bound <= share
    assert share_of(hits(0, needed - 1), 0.95).bound > share


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan])
def test_no_number_of_inputs_is_enough_for_all_or_nothing(value: float) -> None:
    with pytest.raises(ValueError, match=r"^max_share: must be in \(0, 1\)"):
        inputs_needed(value)
    with pytest.raises(ValueError, match=r"^confidence: must be in \(0, 1\)"):
        inputs_needed(0.01, value)


def test_the_bound_of_a_mean_holds_about_as_often_as_it_says() -> None:
    """Squared distances of ten normal outputs, on 200 inputs; the bootstrap is right for many inputs."""
    generator = np.random.default_rng(2)
    found = [mean_of(torch.from_numpy(generator.chisquare(10, size=200)), 0.9) for _ in range(150)]
    assert np.mean([m.bound >= 10 for m in found]) >= 0.9 - 2.5 * math.sqrt(0.09 / 150)
    assert np.mean([m.low <= 10 <= m.high for m in found]) >= 0.9 - 2.5 * math.sqrt(0.09 / 150)
    assert np.mean([m.bound for m in found]) <= 11
    assert all(m.low < m.rate < m.bound < m.high for m in found)


def test_drifts_that_are_equal_have_no_spread() -> None:
    mean = mean_of(torch.full((5,), 0.25), 0.95)
    assert (mean.rate, mean.low, mean.high, mean.bound) == (0.25,) * 4


def test_the_spread_of_one_drift_is_not_known() -> None:
    mean = mean_of(torch.tensor([0.25]), 0.95)
    assert (mean.rate, mean.low, mean.high, mean.bound) == (0.25, 0.0, math.inf, math.inf)


def test_a_single_drift_among_zeros_has_an_interval() -> None:
    mean = mean_of(torch.tensor([1.0] + 499 * [0.0]), 0.95)
    assert mean.rate == pytest.approx(0.002)
    assert 0.002 < mean.bound < 0.03
