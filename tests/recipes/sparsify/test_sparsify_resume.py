"""The files that resumed runs of ``recipes.sparsify`` reuse or refuse."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparsify_cases import SHORT, killed, refusal, small_cnn

from recipes.common.networks import digits_mlp
from recipes.sparsify import experiment, pruning
from recipes.sparsify.command import main
from recipes.sparsify.networks import NETWORKS


def test_resume_keeps_what_is_finished_and_refuses_another_configuration(
    tmp_path, capsys, monkeypatch, short_dense
):
    arguments = ["--out", str(tmp_path), *SHORT, "--method", "fip", "gradual"]
    whole, real = tmp_path.parent / "whole", pruning.sparsify
    assert main(["--out", str(whole), *arguments[2:]]) == 0

    def interrupted(method, *rest, **keywords):
        if method == "gradual":
            raise KeyboardInterrupt
        return real(method, *rest, **keywords)

    monkeypatch.setattr(experiment, "sparsify", interrupted)
    assert main(arguments) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
    taken = []

    def counting(method, *rest, **keywords):
        taken.append(method)
        return real(method, *rest, **keywords)

    monkeypatch.setattr(experiment, "sparsify", counting)
    assert main([*arguments, "--resume"]) == 0
    assert taken == ["gradual"]
    for name in ("fip-0.9", "gradual-0.9"):
        a, b = (load_file(f / "seed-0" / f"{name}.safetensors") for f in (tmp_path, whole))
        assert all(
            torch.equal(a[k], b[k]) for k in a
        )  # the same result as without the interruption
    # A result that was computed on another machine says so.
    record = tmp_path / "seed-0" / "gradual.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "environment": {"cpu": "x"}}))
    assert main([*arguments, "--resume"]) == 0
    assert taken == ["gradual"]
    found = json.loads((tmp_path / "results.json").read_text())["environment"]
    assert found["gradual"] == [{"cpu": "x"}]
    assert found["fip"][0]["torch"] == torch.__version__
    with pytest.raises(SystemExit):
        main([*arguments, "--resume", "--beta", "7"])
    assert "beta 1.0 there, 7.0 asked for" in capsys.readouterr().err


def test_a_dense_network_with_convolutions_is_trained_and_resumed(tmp_path, monkeypatch):
    entry = replace(NETWORKS["digits-mlp"], build=small_cnn, dense_epochs=2)
    monkeypatch.setitem(NETWORKS, "digits-mlp", entry)
    arguments = ["--out", str(tmp_path), *SHORT, "--method"]
    assert main([*arguments, "lottery-ticket"]) == 0
    before = load_file(tmp_path / "seed-0" / "dense.safetensors")
    assert main([*arguments, "lottery-ticket", "one-shot", "--resume"]) == 0
    again = load_file(tmp_path / "seed-0" / "dense.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_a_dense_network_serves_the_runs_that_agree_in_what_it_depends_on(
    tmp_path, capsys, monkeypatch, short_dense
):
    out = ["--out", str(tmp_path), *SHORT, "--method", "one-shot"]
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "sparsify", killed)
        assert main([*out, "--validation", "0.2"]) == 130
    error = refusal(capsys, *out)
    assert "dense" in error
    assert "another configuration (validation 0.2 there, 0.0 asked for)" in error
    assert "autocast False there, True asked for" in refusal(capsys, *out, "--autocast")
    # The dense network does not depend on the sparsity or on settings of the methods.
    monkeypatch.setattr(experiment, "train_dense", killed)
    other = ["--validation", "0.2", "--sparsity", "0.7", "--beta", "3", "--resume"]
    assert main([*out, *other]) == 0
    # A dense network with another number of epochs or another seed is refused.
    monkeypatch.setitem(NETWORKS, "digits-mlp", replace(NETWORKS["digits-mlp"], dense_epochs=3))
    (tmp_path / "seed-0" / "one-shot.json").unlink()
    assert "dense_epochs 2 there, 3 asked for" in refusal(capsys, *out, "--validation", "0.2")
    (tmp_path / "seed-0").rename(tmp_path / "seed-1")
    error = refusal(capsys, *out, "--validation", "0.2", "--seed", "1")
    assert "seed 0 there, 1 asked for" in error


def test_networks_of_another_configuration_are_not_taken_for_those_of_a_finished_run(
    tmp_path, capsys, short_dense
):
    def arguments(name, *options):
        return ["--out", str(tmp_path / name), *SHORT, "--method", "fip", *options]

    assert main(arguments("a", "--beta", "7")) == 0
    assert main(arguments("b")) == 0
    theirs, ours = (tmp_path / name / "seed-0" for name in ("a", "b"))
    for name in ("fip-0.9.safetensors", "path.safetensors", "fip.json"):
        own = (ours / name).read_bytes()
        (ours / name).write_bytes((theirs / name).read_bytes())
        error = refusal(capsys, *arguments("b", "--export"))
        assert str(ours / name) in error
        assert "another configuration (beta 7.0 there, 1.0 asked for)" in error
        (ours / name).write_bytes(own)
    (ours / "fip.json").write_text("{")
    assert "fip.json cannot be read" in refusal(capsys, *arguments("b"))


def test_results_of_later_seeds_of_an_earlier_run_are_not_reused_by_an_interrupted_one(
    tmp_path, monkeypatch, short_dense
):
    def arguments(name, *options):
        out = ["--out", str(tmp_path / name), *SHORT, "--method", "fip", "--seeds", "0", "1"]
        return [*out, *options]

    assert main(arguments("both", "--beta", "7")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "sparsify", killed)
        assert main(arguments("both")) == 130
    assert main(arguments("both", "--resume")) == 0
    assert main(arguments("alone")) == 0
    for seed in (0, 1):
        here, there = (
            load_file(tmp_path / name / f"seed-{seed}" / "fip-0.9.safetensors")
            for name in ("both", "alone")
        )
        assert all(torch.equal(here[name], t) for name, t in there.items())


def test_two_checkpoints_with_the_same_file_name_are_told_apart(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file(digits_mlp().state_dict(), tmp_path / folder / "dense.safetensors")

    def arguments(folder):
        checkpoint = tmp_path / folder / "dense.safetensors"
        out = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), *SHORT]
        return [*out, "--method", "one-shot"]

    assert main(arguments("a")) == 0
    assert main([*arguments("a"), "--resume"]) == 0
    error = refusal(capsys, *arguments("b"))
    assert "another configuration (checkpoint_sha256" in error
