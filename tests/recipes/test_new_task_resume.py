"""recipes.new_task: interrupted runs, and files of other configurations."""

import json
import shutil

import pytest
import torch
from recipe_helpers import SHORT, killed, without_cost

from recipes.continual.methods.distillation import Distillation
from recipes.continual.methods.fip import InvariantPath
from recipes.new_task import command as new_task
from recipes.new_task import experiment

# The path at its shortest: without products nothing is traced.
PATH = [*SHORT, "--epochs", "1", "--products", "0", "--method", "fip"]


def test_an_interrupted_run_loses_only_the_unfinished_method(
    digits_run, tmp_path, capsys, monkeypatch
):
    def interrupted(*args, **keywords):
        raise KeyboardInterrupt

    arguments = ["--out", str(tmp_path), *SHORT, "--keep-networks"]
    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "learn", interrupted)
        assert new_task.main(arguments) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
    finished = (tmp_path / "fip.pt").stat().st_mtime_ns

    with pytest.raises(SystemExit):
        new_task.main([*arguments, "--resume", "--beta", "3"])
    assert "beta 10.0 there, 3.0 asked for" in capsys.readouterr().err

    assert new_task.main([*arguments, "--resume"]) == 0
    assert (tmp_path / "fip.pt").stat().st_mtime_ns == finished
    assert without_cost(tmp_path) == without_cost(digits_run)
    assert (tmp_path / "path.csv").read_text() == (digits_run / "path.csv").read_text()
    for name in ("path", "bars", "scores", "weights"):
        assert (tmp_path / f"{name}.png").exists()


def test_results_of_later_seeds_of_an_earlier_run_are_not_reused_by_an_interrupted_one(
    tmp_path, monkeypatch
):
    arguments = [*PATH, "--seeds", "1", "2"]
    changed = [*arguments, "--beta", "3", "--task1-epochs", "1"]
    both, alone = (["--out", str(tmp_path / name)] for name in ("both", "alone"))
    assert new_task.main([*both, *arguments]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(InvariantPath, "learn", killed)
        assert new_task.main([*both, *changed]) == 130
    assert new_task.main([*both, *changed, "--resume"]) == 0
    assert new_task.main([*alone, *changed]) == 0
    for seed in (1, 2):
        there, here = (tmp_path / name / f"seed-{seed}" for name in ("alone", "both"))
        assert without_cost(here) == without_cost(there)
        assert (here / "path.csv").read_text() == (there / "path.csv").read_text()


def test_a_result_belongs_to_the_configuration_that_is_stored_beside_it(
    tmp_path, capsys, monkeypatch
):
    def main(name, *options):
        return new_task.main(["--out", str(tmp_path / name), *PATH, *options])

    def refused(*options):
        with pytest.raises(SystemExit) as exit:
            main("b", *options, "--resume")
        assert exit.value.code == 2
        return capsys.readouterr().err

    assert main("a", "--beta", "3", "--task1-epochs", "1", "--seeds", "1") == 0
    assert main("b", "--seeds", "0", "1") == 0
    theirs, ours = (tmp_path / name / "seed-1" for name in ("a", "b"))
    own = {file: file.read_bytes() for file in (ours / "fip.pt", ours / "first-task.safetensors")}
    (ours / "fip.pt").write_bytes((theirs / "fip.pt").read_bytes())
    before = (ours / "results.json").read_bytes()
    message = refused("--seeds", "0", "1")
    assert str(ours / "fip.pt") in message
    assert "another configuration (beta 3.0 there, 10.0 asked for; task1_epochs 1" in message
    assert (ours / "results.json").read_bytes() == before
    # The outcome of one seed is refused in the folder of another.
    (ours / "fip.pt").write_bytes((tmp_path / "b" / "seed-0" / "fip.pt").read_bytes())
    assert "another configuration (seed 0 there, 1 asked for)" in refused("--seeds", "0", "1")
    # An outcome without a configuration is refused.
    torch.save({"curve": {}}, ours / "fip.pt")
    assert "does not say which configuration made it" in refused("--seeds", "1")
    (ours / "fip.pt").unlink()
    start = ours / "first-task.safetensors"
    start.write_bytes((theirs / "first-task.safetensors").read_bytes())
    assert "another configuration (task1_epochs 1 there, 2 asked for)" in refused("--seeds", "1")
    # The network after task 1 is reused by every run with the same settings of task 1.
    start.write_bytes(own[start])
    monkeypatch.setattr(experiment, "learn_first_task", killed)
    assert main("b", "--seeds", "1", "--resume", "--beta", "3") == 0


@pytest.mark.parametrize("zipped", [True, False])
def test_an_outcome_of_somebody_else_runs_no_code(zipped, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    (tmp_path / "out").mkdir()
    # The file is checked although its method is not asked for.
    file = tmp_path / "out" / "distillation.pt"
    torch.save({"curve": Payload()}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SystemExit) as exit:
        new_task.main(["--out", str(tmp_path / "out"), *SHORT, "--method", "fip", "--resume"])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert f"{file} holds more than tensors and plain values" in message
    assert "weights_only" not in message  # the message does not tell how to run the code
    assert not (tmp_path / "owned").exists()


def test_networks_of_another_run_are_not_taken_for_those_of_a_finished_path(tmp_path, capsys):
    def main(*options):
        return new_task.main(["--out", str(tmp_path), *PATH, *options])

    assert main("--keep-networks", "--beta", "3") == 0
    kept = (tmp_path / "networks").stat().st_mtime_ns
    assert main() == 0
    with pytest.raises(SystemExit):
        main("--keep-networks", "--resume")
    assert "networks.json is of another configuration (beta 3.0" in capsys.readouterr().err
    assert (tmp_path / "networks").stat().st_mtime_ns == kept
    shutil.rmtree(tmp_path / "networks")
    (tmp_path / "networks.json").unlink()
    with pytest.raises(SystemExit):
        main("--keep-networks", "--resume")
    assert "finished without keeping its networks" in capsys.readouterr().err
    (tmp_path / "fip.pt").unlink()
    assert main("--keep-networks", "--resume") == 0
    assert main("--keep-networks", "--resume") == 0


def test_seeds_can_be_run_one_by_one_and_put_together(tmp_path):
    arguments = ["--out", str(tmp_path), *PATH, "--resume", "--seeds"]
    assert new_task.main([*arguments, "1"]) == 0
    assert new_task.main([*arguments, "2"]) == 0
    finished = [(tmp_path / f"seed-{s}/fip.pt").stat().st_mtime_ns for s in (1, 2)]
    assert new_task.main([*arguments, "1", "2"]) == 0
    assert [(tmp_path / f"seed-{s}/fip.pt").stat().st_mtime_ns for s in (1, 2)] == finished
    both = json.loads((tmp_path / "results.json").read_text())
    assert both["config"]["seeds"] == [1, 2]
