"""Short settings and helpers for the tests of ``recipes.diversity``."""

import pytest

from recipes.common.data import DATASETS
from recipes.diversity.command import main
from recipes.diversity.networks import NETWORKS

INFO = DATASETS["digits"]
SETTINGS = NETWORKS["digits-mlp"].settings.changed(
    members=3,
    straight_away=6,
    straight_between=2,
    away=6,
    between=2,
    epochs=5,
    cycle_epochs=0.2,
)
SHORT = ["--members", "2", "--away", "3", "--between", "1", "--epochs", "3", "--attack-steps", "2"]
SHORT += ["--attack-images", "40", "--white-box-images", "20", "--auto-attack-images", "0"]
SHORT += ["--straight-away", "3", "--straight-between", "1"]
SHORT += ["--cycle-epochs", "0.1", "--no-progress"]


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--resume"])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def killed(*args, **keywords):
    raise KeyboardInterrupt
