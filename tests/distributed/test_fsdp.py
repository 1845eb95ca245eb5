"""Fully sharded models (FSDP2) on two ranks take the path of one process; what they do not do is refused."""

from __future__ import annotations

import re

import pytest
import torch
from fsdp_cases import CASES, steps, whole
from fsdp_rank import resumed, save
from launch import launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def two(folder):
    return launch("fsdp_rank.py", folder / "two", 2, "two", str(folder))


@pytest.mark.parametrize("name", CASES)
def test_the_path_of_two_ranks_is_that_of_one_process(two, name):
    one, other = (rank["cases"][name] for rank in two)
    alone = CASES[name](divided=False)
    for found, same, expected in zip(
        one.pop("weights"), other.pop("weights"), alone.pop("weights"), strict=True
    ):
        assert torch.equal(found, same)
        assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    assert one == other
    assert one.keys() == alone.keys()
    for key, expected in alone.items():
        assert one[key] == pytest.approx(expected, rel=1e-4, abs=1e-9), key


def test_settling_took_products_and_went_back(two):
    """So that the cases above say something of both."""
    cases = two[0]["cases"]
    assert cases["settled by products"]["products"] > 0
    assert cases["settled"]["went_back"] > 0
    assert cases["restored"]["products"] > 0


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "in part",
            r"ValueError.*'2.weight' is whole on every rank.*fully_shard on the whole model",
        ),
        ("hybrid", r"ValueError.*one mesh of one dimension"),
        ("tensor parallel", r"ValueError.*fully_shard was not called on it"),
        ("fsdp1", r"TypeError.*FSDP1.*fully_shard \(FSDP2\)"),
        ("other group", r"ValueError: process_group: .*Leave it out"),
        ("muon", r"ValueError: precondition: Muon .*Use 'adam' or None"),
        ("form", r"ValueError: form: 'forward' .*'finite-difference'"),
        ("compile", r"ValueError: compile: .*leave it out"),
        ("record", r"ValueError: record: .*torch.distributed.checkpoint"),
        ("dense", r"ValueError: dense: .*matvec"),
        ("diagonal", r"ValueError: diagonal: .*a number of probes"),
        ("copies", r"ValueError: state_dict: .*store='full'"),
        ("networks", r"ValueError: inputs: .*store='full'"),
    ],
)
def test_what_a_sharded_model_does_not_do_is_refused_on_every_rank(two, what, words):
    pattern = re.compile(words, re.DOTALL)
    for rank in two:
        assert pattern.search(rank["refusals"][what]), rank["refusals"][what]


def test_half_precision_takes_first_order_steps_and_no_products(two):
    for rank in two:
        assert rank["half"]["moved"] == pytest.approx(0.01, rel=1e-4)
        assert "half precision" in rank["half"]["refused"]
        assert rank["half"]["kept"]


def test_products_and_evaluations_elsewhere_leave_weights_gradients_and_versions(two):
    for rank in two:
        found = rank["unharmed"]
        assert all("ArithmeticError: this output" in error for error in found.pop("errors"))
        assert all(found.values()), found


def test_bad_gradients_and_states_are_refused_on_every_rank(two):
    for number, rank in enumerate(two):
        found = rank["errors"]
        assert "NaN or infinite" in found["nan"]
        assert "set_requires_gradient_sync(True)" in found["no sync"]
        assert found["moved"]
        assert found["kept"]
        assert "set_state_dict" in found["whole state"]
        assert "must be finite" in found["bad state"]
        assert ("rank 1 raised" in found["bad state"]) == (number == 0)


def test_no_rank_has_more_than_its_part_and_two_layers(two):
    for rank in two:
        found = rank["memory"]
        assert 0 < found["whole at once"] <= 2 * found["a layer"]
        assert found["divided"]
        assert found["vector"] == found["all"] / 2
        assert found["kept"] == found["vector"]  # one tensor, Adam's squares


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_goes_on_along_the_same_path_on_one_and_on_four_ranks(two, folder):
    """Of a model that is divided, and of one that each rank has: bit for bit on two ranks, from which it is."""
    alone = {}
    for divided in (True, False):
        for rank in two:
            for found, expected in zip(
                rank["resumed", divided], two[0]["uninterrupted", divided], strict=True
            ):
                assert torch.equal(found, expected)
        alone[divided] = resumed(folder, "after 2", divided=divided)
        steps(*alone[divided], 2)
        save(folder, "after 4", *alone[divided], divided=divided)
    four = launch("fsdp_rank.py", folder / "four", 4, "four", str(folder))
    for divided, (model, opt) in alone.items():
        steps(model, opt, 2)
        for k, expected in enumerate(two[0]["uninterrupted", divided]):
            torch.testing.assert_close(whole(model)[k], expected, rtol=1e-9, atol=1e-12)
            for rank in four:
                found = rank["resumed", divided][k]
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
