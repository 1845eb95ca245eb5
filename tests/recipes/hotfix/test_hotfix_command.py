"""The command line of ``recipes.hotfix``: input that is refused, by the name of the option."""

import sys

import pytest
import torch
from hotfix_cases import SHORT, refusal

from recipes.common.networks import digits_mlp
from recipes.hotfix import experiment


@pytest.fixture
def untrained(monkeypatch):
    """Fails the test if anything is trained."""

    def fail(*args, **keywords):
        raise AssertionError("trained before the arguments were checked")

    monkeypatch.setattr(experiment, "train", fail)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist"], "argument --data: invalid choice: 'mnist'"),
        (["--data", "cifar10"], "argument --checkpoint: cifar10 needs the file"),
        (["--checkpoint", "old.pt"], "argument --checkpoint: the network of digits is trained"),
        (["--wrong", "0"], "argument --wrong: 0 is out of range"),
        (["--max-flips", "1"], "argument --max-flips: 1 is out of range"),
        (["--max-flips", "-0.1"], "argument --max-flips: -0.1 is out of range"),
        (["--max-steps", "0"], "argument --max-steps: 0 is out of range"),
        (["--anchors", "5000"], "argument --anchors: 5000 is more than the 404 training inputs"),
        (["--anchor-batch", "301"], "argument --anchor-batch: 301 is more than the 300 anchors"),
        (["--unseen", "9000"], "argument --unseen: 9000 is more than the"),
        (["--check", "9000"], "argument --check: 9010 is more than the"),
        (["--precondition", "magic"], "argument --precondition: invalid choice: 'magic'"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--seeds", "0", "0"], "argument --seeds: 0 is given twice"),
        (["--device", "abacus"], "argument --device"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys, untrained, tmp_path):
    assert message in refusal(capsys, tmp_path, *arguments)


def test_a_checkpoint_that_does_not_fit_is_refused(capsys, tmp_path):
    torch.save(digits_mlp().state_dict(), tmp_path / "old.pt")
    arguments = ["--data", "cifar10", "--checkpoint", str(tmp_path / "old.pt")]
    said = refusal(capsys, tmp_path, *arguments)
    assert "argument --checkpoint: " in said
    assert "does not fit the network" in said


def test_a_checkpoint_that_is_not_there_is_refused(capsys, tmp_path):
    arguments = ["--data", "cifar10", "--checkpoint", str(tmp_path / "none.pt")]
    assert "argument --checkpoint: cannot be read" in refusal(capsys, tmp_path, *arguments)


def test_too_few_wrong_inputs_are_named(capsys, tmp_path):
    said = refusal(capsys, tmp_path, *SHORT, "--wrong", "400")
    assert "argument --wrong: the network gets only" in said


def test_kfac_without_curvlinops_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    said = refusal(capsys, tmp_path, *SHORT, "--method", "kfac")
    assert "argument --method: kfac needs curvlinops" in said
