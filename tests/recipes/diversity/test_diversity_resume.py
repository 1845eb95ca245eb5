"""Results of ``recipes.diversity``, and the files that resumed runs reuse or refuse."""

import json

import pytest
from diversity_cases import SHORT, killed, refusal
from safetensors.torch import load_file, save_file

from recipes.common.networks import digits_mlp
from recipes.diversity.command import main
from recipes.diversity.ensembles import SECONDS_FILE
from recipes.diversity.methods import METHODS, path_names


def test_the_recipe_leaves_results_members_and_plots_and_resumes(tmp_path, capsys, rendered):
    arguments = ["--out", str(tmp_path), *SHORT, "--seeds", "0", "1"]
    assert main([*arguments, "--objective", "none", "--baseline", "noise"]) == 0
    everything = [*arguments, "--objective", *path_names(), "--baseline", "all"]
    kept = (tmp_path / "seed-0" / "none.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main([*everything, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "seed 0, path, misaligned" in out
    assert "seed 0, path, L = 0" not in out  # this method was finished
    assert (tmp_path / "seed-0" / "none.json").stat().st_mtime_ns == kept
    found = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert list(found["ensembles"]) == list(METHODS)
    path = found["ensembles"]["none"]
    assert 0 <= path["transfer_joint_0.1"] <= 100
    assert path["intervals_95"]["clean_joint"] >= 0
    assert len(path["diversity_by_layer"]) == 3
    for name in ("attacks", "coherence", "layers", "weights", "pictures"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0
    digits_mlp().load_state_dict(load_file(tmp_path / "seed-1" / "fge" / "member-001.safetensors"))
    with pytest.raises(SystemExit):
        main([*everything, "--resume", "--beta", "3"])
    assert "another configuration (beta " in capsys.readouterr().err


def test_results_of_later_seeds_of_an_earlier_run_are_not_reused_by_an_interrupted_one(
    tmp_path, monkeypatch
):
    def arguments(name, *options):
        methods = ["--objective", "withstand", "--baseline", "--seeds", "0", "1"]
        return ["--out", str(tmp_path / name), *SHORT, *methods, *options]

    assert main(arguments("both", "--withstand-beta", "1", "--epochs", "2")) == 0
    with monkeypatch.context() as patch:
        patch.setattr("recipes.diversity.experiment.build_ensemble", killed)
        assert main(arguments("both")) == 130
    assert main(arguments("both", "--resume")) == 0
    assert main(arguments("alone")) == 0
    both, alone = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("both", "alone")
    )
    assert both["config"] == alone["config"]
    for metrics in (both["metrics"], alone["metrics"]):
        for numbers in ("deviations", "intervals_95"):
            metrics["ensembles"]["withstand"][numbers].pop("seconds")
        metrics["ensembles"]["withstand"].pop("seconds")
    assert both["metrics"] == alone["metrics"]


def test_a_result_belongs_to_the_configuration_that_is_stored_beside_it(tmp_path, capsys):
    def arguments(name, *options):
        methods = ["--objective", "none", "--baseline", "independent"]
        return ["--out", str(tmp_path / name), *SHORT, *methods, *options]

    assert main(arguments("a", "--epochs", "2")) == 0
    assert main(arguments("b")) == 0
    theirs, ours = (tmp_path / name / "seed-0" for name in ("a", "b"))
    for name in (
        "start.json",
        "start.safetensors",
        "attacked.safetensors",
        "none.json",
        "none/member-001.safetensors",
        "independent/member-000.safetensors",
        f"independent/{SECONDS_FILE}",
    ):
        own = (ours / name).read_bytes()
        (ours / name).write_bytes((theirs / name).read_bytes())
        error = refusal(capsys, *arguments("b"))
        assert str(ours / name) in error
        assert "another configuration (epochs 2 there, 3 asked for)" in error
        (ours / name).write_bytes(own)
    # Members of an unfinished ensemble of another configuration are not reused either.
    (ours / "independent.json").unlink()
    (theirs / "independent").rename(ours / "independent-theirs")
    (ours / "independent").rename(ours / "independent-ours")
    (ours / "independent-theirs").rename(ours / "independent")
    assert "epochs 2 there, 3 asked for" in refusal(capsys, *arguments("b"))


def test_a_run_interrupted_before_the_attacks_are_recorded_resumes(tmp_path, rendered):
    out = ["--out", str(tmp_path), *SHORT, "--objective", "none", "--baseline"]
    assert main(out) == 0
    record = tmp_path / "seed-0" / "start.json"
    whole = json.loads(record.read_text())
    record.write_text(json.dumps({k: v for k, v in whole.items() if k != "transfer"}))
    (tmp_path / "seed-0" / "none.json").unlink()
    assert main([*out, "--resume"]) == 0
    assert json.loads(record.read_text())["transfer"] == whole["transfer"]


def test_a_checkpoint_is_identified_by_its_content(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file(digits_mlp().state_dict(), tmp_path / folder / "start.safetensors")

    def arguments(folder):
        out = ["--checkpoint", str(tmp_path / folder / "start.safetensors")]
        out += ["--out", str(tmp_path / "out"), "--objective", "none", "--baseline"]
        return [*out, *SHORT]

    assert main(arguments("a")) == 0
    assert "another configuration (checkpoint_sha256" in refusal(capsys, *arguments("b"))
