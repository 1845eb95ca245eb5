"""The command line of ``recipes.update``: input that is refused, by the name of the option."""

import pytest

from recipes.update import experiment
from recipes.update.command import main


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """Fails the test if anything is trained."""

    def fail(*args, **keywords):
        raise AssertionError("trained before the arguments were checked")

    monkeypatch.setattr(experiment, "learn", fail)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "resnet50"], "argument --network: invalid choice: 'resnet50'"),
        (["--max-flips", "1"], "argument --max-flips: 1 is out of range"),
        (["--max-flips", "0.1", "0.1"], "argument --max-flips: 0.1 is given twice"),
        (["--held-out", "0"], "argument --held-out: 0 leaves no input"),
        (["--epochs", "0"], "argument --epochs: 0 is out of range"),
        (["--baseline-epochs", "-1"], "argument --baseline-epochs: -1 is out of range"),
        (["--anchors", "0"], "argument --anchors: 0 is out of range"),
        (["--precondition", "magic"], "argument --precondition: invalid choice: 'magic'"),
        (["--batch-norm", "none"], "argument --batch-norm: invalid choice: 'none'"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--device", "abacus"], "argument --device"),
        (["--network", "resnet18-narrow", "--data-root", "nowhere"], "cifar100 could not be read"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
