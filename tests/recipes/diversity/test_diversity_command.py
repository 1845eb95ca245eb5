"""The command line of ``recipes.diversity``: checkpoints, sizes of attacks, and input that is refused."""

import json

import pytest
import torch
from diversity_cases import SHORT, refusal

from recipes.common.networks import digits_mlp
from recipes.diversity.command import main


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_somebody_else_runs_no_code(zipped, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    path = tmp_path / "start.pt"
    torch.save({"1.weight": Payload()}, path, _use_new_zipfile_serialization=zipped)
    error = refusal(capsys, "--checkpoint", str(path), "--out", str(tmp_path / "out"))
    assert f"argument --checkpoint: {path} cannot be read as weights" in error
    assert not (tmp_path / "owned").exists()
    torch.save(digits_mlp().state_dict(), path)  # a state dict that torch saved is accepted
    out = ["--out", str(tmp_path / "out"), "--objective", "none", "--baseline"]
    assert main(["--checkpoint", str(path), *out, *SHORT]) == 0


def test_attack_sizes_that_print_the_same_are_merged(tmp_path):
    out = ["--out", str(tmp_path), *SHORT, "--objective", "none", "--baseline"]
    sizes = ["--attack-eps", "0.1", "0.10000000001", "0.1", "0.2", "--table-eps", "0.1"]
    assert main([*out, *sizes]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["config"]["attack_eps"] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "0", "0"], "argument --seeds: 0 is given twice"),
        (["--members", "1"], "argument --members: 1 is out of range"),
        (["--objective", "fame"], "invalid choice: 'fame'"),
        (["--attack-eps", "8"], "argument --attack-eps: 8 is out of range"),
        (["--anchors", "100000"], "more than the 1347 training inputs"),
        (["--checkpoint", "nowhere.safetensors"], "argument --checkpoint: nowhere.safetensors"),
        (["--network", "cnn", "--data", "digits"], "cnn takes fashion-mnist, got 'digits'"),
        (["--objective", "--baseline", "noise"], "noise is as long as a path"),
        (["--objective", "--baseline"], "name an --objective or a --baseline"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/seed-*/*"))
