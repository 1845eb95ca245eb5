"""``recipes.quantize`` from end to end: files, tables, resumed runs, and input that is refused."""

import pytest
import torch
from quantize_cases import SHORT, refusal, run
from safetensors.torch import load_file

from fipoptim.secondary.grid import largest_integer
from recipes.common.data import load_task
from recipes.common.networks import digits_mlp
from recipes.quantize import experiment
from recipes.quantize.command import main
from recipes.quantize.export import load_quantized
from recipes.quantize.methods import METHODS, register


def test_a_run_leaves_networks_that_are_what_the_table_says(tmp_path, capsys, rendered):
    results = run(tmp_path, "--export")
    printed = capsys.readouterr().out
    assert set(results["metrics"]) == {"dense_accuracies", *METHODS}
    task = load_task("digits")
    dense = digits_mlp()
    dense.load_state_dict(load_file(tmp_path / "seed-0" / "dense.safetensors"))
    for method in METHODS:
        found = results["metrics"][method]
        assert printed.count(found["title"]) >= 3  # the line, and a row for each number of bits
        assert [n["bits"] for n in found["networks"]] == [4, 2]
        for network in found["networks"]:
            bits = network["bits"]
            folder = tmp_path / "export" / f"{method}-{bits}"
            state, grids = load_quantized(folder / "quantized.safetensors")
            plain = load_file(folder / "weights.safetensors")
            assert state.keys() == plain.keys()
            assert all(torch.equal(state[name], plain[name]) for name in plain)
            assert set(grids) == {"1.weight", "3.weight", "5.weight"}
            for grid in grids.values():
                assert int(grid.integers.abs().max()) <= largest_integer(bits)
            model = digits_mlp()
            model.load_state_dict(plain)
            with torch.no_grad():
                now, before = model(task.test_inputs), dense(task.test_inputs)
            right = (now.argmax(dim=1) == task.test_labels).double().mean()
            assert network["accuracy"] == pytest.approx(100 * float(right))
            agree = (now.argmax(dim=1) == before.argmax(dim=1)).double().mean()
            assert network["agreement"] == pytest.approx(100 * float(agree))
            drift = (now - before).square().sum(dim=1).mean()
            assert network["drift"] == pytest.approx(float(drift), rel=1e-4)
            # Packed integers, a float32 scale for each of 202 channels, and as many biases.
            size = sum(-(-n * bits // 8) for n in (64 * 128, 128 * 64, 64 * 10)) + 8 * 202
            assert network["bytes"] == size
            assert network["bits_a_weight"] == pytest.approx(bits + 32 * 202 / 17024)
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupted_run_goes_on_with_the_next_bits(tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole", "--method", "fip")
    path, finished = METHODS["fip"], []

    class Interrupted(type(path)):
        def quantize(self, model, case, settings, progress):
            if finished:
                raise KeyboardInterrupt
            finished.append(case.bits)
            return super().quantize(model, case, settings, progress)

    monkeypatch.setitem(METHODS, "fip", Interrupted())
    arguments = [*SHORT, "--method", "fip", "--out", str(tmp_path / "parts")]
    assert main(arguments) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setitem(METHODS, "fip", path)
    ran = []

    class Counted(type(path)):
        def quantize(self, model, case, settings, progress):
            ran.append(case.bits)
            return super().quantize(model, case, settings, progress)

    monkeypatch.setitem(METHODS, "fip", Counted())
    assert main([*arguments, "--resume"]) == 0
    assert (finished, ran) == ([4], [2])
    for bits in (4, 2):
        states = [
            load_file(tmp_path / folder / "seed-0" / f"fip-{bits}.safetensors")
            for folder in ("whole", "parts")
        ]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert len(whole["metrics"]["fip"]["networks"]) == 2


def test_files_of_another_configuration_are_refused(tmp_path, capsys):
    run(tmp_path, "--method", "rounding")
    said = refusal(capsys, tmp_path, *SHORT, "--method", "rounding", "--views", "2", "--resume")
    assert "views 1 there, 2 asked for" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "1"], "argument --bits: 1 is out of range"),
        (["--bits", "9"], "argument --bits: 9 is out of range"),
        (["--bits", "4", "4"], "argument --bits: 4 is given twice"),
        (["--data", "mnist"], "argument --data: digits-mlp takes digits, got 'mnist'"),
        (["--network", "vgg"], "argument --network: invalid choice: 'vgg'"),
        (["--network", "resnet20"], "argument --checkpoint: resnet20 needs the file"),
        (["--checkpoint", "none.pt"], "argument --checkpoint: cannot be read"),
        (["--anchors", "5000"], "argument --anchors: 5000 is more than the 1347 training inputs"),
        (["--hold", "2", "9"], "argument --hold: the network has no layer '9'"),
        (["--steps", "0"], "argument --steps: 0 is out of range"),
        (["--precondition", "magic"], "argument --precondition: invalid choice: 'magic'"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--validation", "1"], "argument --validation: 1 is out of range"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    def fail(*args, **keywords):
        raise AssertionError("trained before the arguments were checked")

    monkeypatch.setattr(experiment, "train", fail)
    assert message in refusal(capsys, tmp_path, *arguments)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'fip' is registered already"):
        register("fip", METHODS["rounding"])
