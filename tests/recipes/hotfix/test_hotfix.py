"""``recipes.hotfix`` from end to end: the promise, what is said of it, and the parts of the data."""

import dataclasses

import pytest
import torch
from hotfix_cases import SHORT, digits, network, run

from recipes.common.training import scores
from recipes.hotfix.case import draw
from recipes.hotfix.command import main
from recipes.hotfix.methods import METHODS
from recipes.hotfix.setups import SETUPS


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hotfix")
    return folder, run(folder, "--method", "all", "--max-flips", "0.01")


def case_of(folder, **changes):
    settings = dataclasses.replace(
        SETUPS["digits"].settings, wrong=3, check=200, unseen=200, **changes
    )
    old = network(folder, "old")
    return draw(old, digits(), settings, augment=None, development=False, seed=0)


def test_the_budget_holds_on_the_check_inputs(finished):
    folder, results = finished
    case, _ = case_of(folder)
    fixed = network(folder, "fip")
    with torch.no_grad():
        flips = case.old(case.check).argmax(dim=1) != fixed(case.check).argmax(dim=1)
    assert float(flips.double().mean()) <= results["config"]["max_flips"] == 0.01
    assert results["metrics"]["fip"]["flips_check"] == int(flips.sum())


def test_what_is_said_to_be_fixed_is(finished):
    folder, results = finished
    case, _ = case_of(folder)
    assert bool((case.old(case.wrong_inputs).argmax(dim=1) != case.wrong_labels).all())
    assert set(results["metrics"]) == set(METHODS)
    for method, found in results["metrics"].items():
        p = scores(network(folder, method), case.wrong_inputs, case.wrong_labels)
        assert found["fixed"] == int((p > 0.5).sum())
    assert results["metrics"]["fip"]["fixed"] == 3


def test_flips_on_unseen_inputs_are_counted_once_more(finished):
    folder, results = finished
    case, unseen = case_of(folder)
    for method, found in results["metrics"].items():
        with torch.no_grad():
            before, now = case.old(unseen.inputs), network(folder, method)(unseen.inputs)
        assert found["flips_unseen"] == int((before.argmax(dim=1) != now.argmax(dim=1)).sum())
        drift = float((now - before).square().sum(dim=1).mean())
        assert found["drift_unseen"] == pytest.approx(drift, rel=1e-4)


@pytest.mark.parametrize("development", [False, True])
def test_no_input_is_in_two_sets(finished, development):
    folder, _ = finished
    settings = dataclasses.replace(SETUPS["digits"].settings, wrong=3, check=200, unseen=200)
    task = digits()
    seen = []
    for seed in (0, 1):
        case, unseen = draw(
            network(folder, "old"),
            task,
            settings,
            augment=None,
            development=development,
            seed=seed,
        )
        sets = [case.wrong_inputs, case.anchors, case.check, unseen.inputs]
        rows = {tuple(row.tolist()) for part in sets for row in part.flatten(1)}
        assert len(rows) == sum(map(len, sets))
        seen.append([{tuple(row.tolist()) for row in part.flatten(1)} for part in sets])
    # What one seed chooses by is never what another one is measured on.
    if not development:
        assert not seen[0][3] & seen[1][2]
        assert not seen[0][3] & seen[1][0]


def test_a_run_that_does_not_get_there_says_so(tmp_path, capsys):
    found = run(tmp_path, "--method", "fip", "--max-steps", "1", "--max-flips", "0")
    assert found["metrics"]["fip"]["fixed"] < 3
    assert found["metrics"]["fip"]["flips_check"] == 0
    said = capsys.readouterr().out
    assert "NOT FIXED" in said
    assert "raise --max-steps (1) or the budget, --max-flips (0)" in said


def test_a_resumed_run_finds_what_there_is(finished, capsys):
    folder, results = finished
    assert (
        main([*SHORT, "--max-flips", "0.01", "--method", "fip", "--resume", "--out", str(folder)])
        == 0
    )
    said = capsys.readouterr().out
    assert "Certificate on 200 inputs" in said
    assert f"{results['metrics']['fip']['seconds']:.1f}" in said


def test_a_name_is_registered_once():
    from recipes.hotfix.methods import register

    with pytest.raises(ValueError, match="'fip' is registered already"):
        register("fip", METHODS["plain"])
