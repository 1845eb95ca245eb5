"""The command line of ``recipes.sparsify``: checkpoints, and input that is refused."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparsify_cases import SHORT, small_cnn

from recipes.common.networks import digits_mlp, lenet_300_100
from recipes.sparsify import experiment
from recipes.sparsify.command import main
from recipes.sparsify.dense import load_dense
from recipes.sparsify.networks import NETWORKS


def test_a_checkpoint_with_convolutions_serves_several_seeds(tmp_path, monkeypatch, rendered):
    torch.manual_seed(0)
    model = small_cnn()
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    entry = replace(NETWORKS["digits-mlp"], build=small_cnn)
    monkeypatch.setitem(NETWORKS, "digits-mlp", entry)
    arguments = ["--checkpoint", str(tmp_path / "dense.safetensors"), "--out", str(tmp_path)]
    assert main([*arguments, *SHORT, "--method", "fip", "--seeds", "0", "1"]) == 0
    for seed in (0, 1):
        found = load_file(tmp_path / f"seed-{seed}" / "dense.safetensors")
        assert all(torch.equal(found[name], t) for name, t in model.state_dict().items())


def test_sparsities_that_are_nearly_alike_have_files_of_their_own(tmp_path, short_dense, rendered):
    arguments = ["--out", str(tmp_path), *SHORT, "--method", "one-shot"]
    assert main([*arguments, "--sparsity", "0.9", "0.9000001"]) == 0
    files = sorted(file.name for file in (tmp_path / "seed-0").glob("one-shot-*"))
    assert files == ["one-shot-0.9.safetensors", "one-shot-0.9000001.safetensors"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_somebody_else_runs_no_code(zipped, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    path = tmp_path / "dense.pt"
    torch.save({"1.weight": Payload()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SystemExit) as stop:
        main(["--checkpoint", str(path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"{path} cannot be read as weights" in error
    assert "weights_only" not in error  # the message does not tell how to run the code
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_is_the_start_network(tmp_path, dense, short_dense, rendered):
    save_file(dense.model.state_dict(), tmp_path / "dense.safetensors")
    torch.save(dense.model.state_dict(), tmp_path / "dense.pt")
    for name in ("dense.safetensors", "dense.pt"):
        loaded = load_dense(tmp_path / name, digits_mlp())
        assert loaded.early is None
        assert torch.equal(loaded.model[1].weight, dense.model[1].weight)
    arguments = ["--checkpoint", str(tmp_path / "dense.pt"), "--out", str(tmp_path / "out"), *SHORT]
    assert main([*arguments, "--method", "lottery-ticket", "fip"]) == 0
    found = load_file(tmp_path / "out" / "seed-0" / "dense.safetensors")
    assert torch.equal(found["1.weight"], dense.model[1].weight)


def message_of(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def untrained(monkeypatch):
    """Fails the test if anything is trained or loaded."""

    def fail(*args, **keywords):
        raise AssertionError("trained before the arguments were checked")

    monkeypatch.setattr(experiment, "train_dense", fail)
    monkeypatch.setattr(experiment, "sparsify", fail)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1"], "argument --sparsity: must be at least 0 and below 1, got 1.0"),
        (["--sparsity", "0.9", "-0.1"], "argument --sparsity: must be at least 0 and below 1"),
        (["--sparsity", "nan"], "not a finite number"),
        (["--sparsity", "0.9", "0.90"], "argument --sparsity: 0.9 is given twice"),
        (["--seeds", "0", "0"], "argument --seeds: 0 is given twice"),
        (["--sparsity", "0.9999", "--per-layer"], "would leave 5.weight none of its 640 weights"),
        (["--keep", "6"], "argument --keep: the model has no parameter or module '6'"),
        (["--data", "emnist"], "unknown data set 'emnist': choose from digits, mnist"),
        (["--network", "resnet20", "--data", "mnist"], "resnet20 takes cifar10, got 'mnist'"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--anchors", "5000"], "5000 is more than the 1347 training inputs of digits"),
        (["--products", "-1"], "out of range"),
        (["--device", "abacus"], "argument --device"),
        (["--network", "lenet-300-100", "--data-root", "/nowhere"], "add --download"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_trained(
    arguments, message, capsys, untrained, tmp_path
):
    assert message in message_of([*arguments, "--out", str(tmp_path)], capsys)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, capsys, untrained):
    path, out = tmp_path / "dense.pt", ["--out", str(tmp_path / "out")]
    torch.save(lenet_300_100().state_dict(), path)
    error = message_of(["--checkpoint", str(path), *out], capsys)
    assert "1.weight is (300, 784), not (128, 64)" in error
    torch.save({"head.weight": torch.zeros(2)}, path)
    error = message_of(["--checkpoint", str(path), *out], capsys)
    assert "lacks 1.weight" in error
    assert "has unknown head.weight" in error
    path.write_bytes(b"nonsense")
    assert "cannot be read as weights" in message_of(["--checkpoint", str(path), *out], capsys)
    torch.save([1, 2], path)
    assert "holds no state dict" in message_of(["--checkpoint", str(path), *out], capsys)
    missing = str(tmp_path / "none.safetensors")
    assert "cannot be read as weights" in message_of(["--checkpoint", missing, *out], capsys)
