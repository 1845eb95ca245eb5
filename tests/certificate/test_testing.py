"""What users test their own networks with."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipoptim import AnchorBatch, AnchorMetric
from fipoptim.testing import assert_kept, inputs_near, small_networks


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(40, 4)


def test_a_copy_is_kept() -> None:
    model, inputs = network()
    assert_kept(model, copy.deepcopy(model), inputs)
    assert_kept(model, copy.deepcopy(model), inputs, max_drift=0.0, max_flips=0.0)
    assert_kept(model, model(inputs), inputs, max_drift=1e-12)


def test_a_flip_is_listed() -> None:
    model, inputs = network()
    outputs = model(inputs).detach()
    outputs[[3, 7]] = outputs[[3, 7]].roll(1, dims=1)
    with pytest.raises(
        AssertionError, match=r"^max_flips: 2 of 40 .*\(5.000%\), 0.000% .*\[3, 7\]"
    ):
        assert_kept(model, outputs, inputs)
    assert_kept(model, outputs, inputs, max_flips=0.05)


def test_a_drift_is_listed() -> None:
    model, inputs = network()
    outputs = model(inputs).detach()
    outputs[5] += 10.0
    with pytest.raises(AssertionError, match=r"^max_drift: the drift is 7.5, 1 was .*inputs \[5"):
        assert_kept(model, outputs, inputs, max_drift=1.0)
    assert_kept(model, outputs, inputs, max_drift=7.6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_flips": 1.0}, ValueError, r"^max_flips: must be in \[0, 1\)"),
        ({"max_drift": math.nan}, ValueError, "^max_drift: must be finite"),
        ({"chunk_size": 0}, ValueError, "^chunk_size"),
        ({"reference": 3}, TypeError, "^reference: must be a torch.nn.Module"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, inputs = network()
    arguments: dict[str, Any] = {"model": model, "reference": model, "inputs": inputs} | options
    with pytest.raises(error, match=message):
        assert_kept(**arguments)


# --- inputs near others ------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(inputs_near(torch.zeros(5, 4), noise=0.25))
def test_noise_is_within_its_size(inputs: Tensor) -> None:
    assert inputs.shape == (5, 4)
    assert float(inputs.abs().max()) <= 0.25


IMAGES = torch.arange(1.0, 33.0).reshape(2, 1, 4, 4)


@settings(max_examples=50, deadline=None)
@given(inputs_near(IMAGES, shift=2))
def test_a_shifted_image_is_a_part_of_the_image_with_zeros_beside(images: Tensor) -> None:
    padded = torch.nn.functional.pad(IMAGES, (2, 2, 2, 2))
    parts = [
        padded[..., row : row + 4, column : column + 4] for row in range(5) for column in range(5)
    ]
    assert any(torch.equal(images, part) for part in parts)


def test_shifts_are_down_and_across_by_what_is_drawn() -> None:
    seen = set()

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(inputs_near(IMAGES, shift=1))
    def collect(images: Tensor) -> None:
        seen.add(tuple(images[0].flatten().tolist()))

    collect()
    assert len(seen) == 9


@settings(max_examples=50, deadline=None)
@given(
    inputs_near(
        {"tokens": torch.arange(12).reshape(2, 6), "mask": torch.ones(2, 6).long()}, swaps=3
    )
)
def test_swapped_texts_have_the_same_tokens(inputs: dict[str, Tensor]) -> None:
    assert torch.equal(inputs["tokens"].sort(dim=1).values, torch.arange(12).reshape(2, 6))
    displaced = (inputs["tokens"] - torch.arange(12).reshape(2, 6)).abs().max()
    assert int(displaced) <= 3  # a token moves one place a swap
    assert torch.equal(inputs["mask"], torch.ones(2, 6).long())


def test_a_token_and_its_mask_are_swapped_together() -> None:
    pairs = (torch.arange(12).reshape(2, 6), 100 + torch.arange(12).reshape(2, 6))

    @settings(max_examples=30, deadline=None)
    @given(inputs_near(pairs, swaps=4))
    def check(inputs: tuple[Tensor, Tensor]) -> None:
        assert torch.equal(inputs[1], inputs[0] + 100)

    check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^inputs_near: give at least one of noise, shift and swaps"),
        ({"noise": -1.0}, "^noise: must be finite and >= 0"),
        ({"shift": 0.5}, "^shift: must be an integer >= 0, got 0.5"),
        ({"swaps": -1}, "^swaps: must be an integer >= 0, got -1"),
    ],
)
def test_changes_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inputs_near(torch.zeros(2, 3), **options)


def test_without_hypothesis_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis.strategies", None)
    with pytest.raises(ImportError, match="^hypothesis is needed to draw inputs.*pip install"):
        inputs_near(torch.zeros(2, 3), noise=0.1)


# --- small networks ----------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(small_networks(classes=4), st.integers(0, 100))
def test_small_networks_have_a_metric(drawn: tuple[nn.Module, Tensor], seed: int) -> None:
    model, inputs = drawn
    assert not model.training
    assert model(inputs).shape == (len(inputs), 4)
    metric = AnchorMetric(AnchorBatch(model, inputs), form="forward", trace=False)
    v = torch.randn(metric.size, generator=torch.Generator().manual_seed(seed))
    assert float(v @ metric.matvec(v)) >= 0


def test_the_invariance_test_of_the_documentation_finds_a_change() -> None:
    shipped, held_out = network()
    changed = copy.deepcopy(shipped)
    with torch.no_grad():
        changed[2].bias[0] += 1.0

    @settings(max_examples=20, deadline=None, database=None)
    @given(inputs_near(held_out, noise=0.05))
    def test(inputs: Any) -> None:
        assert_kept(changed, shipped, inputs, max_flips=0.02)

    with pytest.raises(AssertionError, match="^max_flips"):
        test()
