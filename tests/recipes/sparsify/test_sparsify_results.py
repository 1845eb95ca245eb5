"""Tables, plots, ``results.json`` and exported networks of ``recipes.sparsify``."""

import json

import pytest
import torch
from matplotlib.text import Text
from safetensors.torch import load_file, save_file
from sparsify_cases import NAMES, SETTINGS, SHORT, TOTAL, some_masks

from recipes.common.networks import digits_mlp
from recipes.sparsify import figures
from recipes.sparsify.command import main
from recipes.sparsify.export import export, load_compressed
from recipes.sparsify.masks import MaskedWeights
from recipes.sparsify.methods import METHODS


def test_the_title_of_a_column_names_the_method_that_ran():
    def of(method, *, rewinds=True, **changes):
        return METHODS[method].full_title(SETTINGS.changed(**changes), rewinds=rewinds)

    assert of("fip") == "invariant path"
    assert of("fip", labels=True) == "invariant path + labels"
    assert of("lottery-ticket") == "lottery ticket"
    # There are no initial weights to go back to.
    assert of("lottery-ticket", rewinds=False) == "iterative, labels"
    assert of("gradual-distillation") == "gradual, distilled"
    assert of("gradual-features") == "gradual, distilled with features"
    assert of("fip", hold_features=True) == "invariant path with features"


def legends(monkeypatch):
    """Returns the labels of the curves in each plot, by file name."""
    found = {}

    def save(figure, path, **keywords):
        texts = [t.get_text() for axes in figure.axes for t in axes.findobj(Text)]
        found[path.name] = texts
        figures.plt.close(figure)

    monkeypatch.setattr(figures, "save", save)
    return found


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--no-hold-features", "invariant path"),
        ("--hold-features", "invariant path with features"),
    ],
)
def test_tables_plots_and_results_name_the_variant_of_the_path_that_ran(
    option, name, tmp_path, capsys, monkeypatch, short_dense
):
    drawn = legends(monkeypatch)
    arguments = ["--out", str(tmp_path), "--no-progress", "--sparsity", "0.5", "--epochs", "1"]
    arguments += ["--baseline-epochs", "1", "--method", "fip", "one-shot", "--probes", "1"]
    assert main([*arguments, option]) == 0
    printed = capsys.readouterr().out
    assert printed.count(name) == 3  # the plan, the run, the table
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["title"] == name
    assert metrics["baselines"]["one-shot"]["title"] == "one-shot, labels"
    assert name in drawn["accuracy.png"]
    assert name in drawn["weights.png"]


def test_a_lottery_ticket_that_starts_from_a_checkpoint_is_not_called_one(tmp_path, capsys, dense):
    save_file(dense.model.state_dict(), tmp_path / "dense.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "dense.safetensors"), *SHORT]
    assert main([*arguments, "--method", "lottery-ticket", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "iterative, labels" in printed
    assert "lottery ticket" not in printed


def test_export_loads_again_and_is_smaller(tmp_path):
    model = digits_mlp()
    kept = some_masks(model, 0.95)
    held = MaskedWeights(model, NAMES)
    held.hold(kept)
    state = model.state_dict()
    sizes = export(state, NAMES, tmp_path)
    assert sizes.compressed < sizes.dense / 5
    assert sizes.compressed == (tmp_path / "compressed.safetensors").stat().st_size
    digits_mlp().load_state_dict(load_file(tmp_path / "weights.safetensors"))
    masks = load_file(tmp_path / "masks.safetensors")
    back = load_compressed(tmp_path / "compressed.safetensors")
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)
        if name in NAMES:
            assert torch.equal(masks[name], tensor != 0)


def test_the_recipe_leaves_its_results(tmp_path, capsys, short_dense, rendered):
    arguments = ["--out", str(tmp_path), *SHORT, "--method", "all", "--export"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "sparsity of 17,024 weights" in printed
    assert "times smaller" in printed
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert {"dense_accuracy", "sparsity", "nonzero", "total", "accuracy"} <= set(metrics)
    assert metrics["nonzero"] == TOTAL - round(0.9 * TOTAL)
    assert metrics["sparsity"] == 1 - metrics["nonzero"] / TOTAL
    assert set(metrics["per_layer_sparsity"]) == set(NAMES)
    assert set(metrics["baselines"]) == set(METHODS) - {"fip"}
    assert len(metrics["networks"]) == 2
    for name in ("accuracy.png", "weights.png", "layers.png"):
        assert (tmp_path / name).stat().st_size > 1000
    state = load_file(tmp_path / "seed-0" / "fip-0.9.safetensors")
    digits_mlp().load_state_dict(state)
    assert sum(int((state[n] == 0).sum()) for n in NAMES) == round(0.9 * TOTAL)


def test_no_two_methods_look_the_same():
    assert len(set(figures._COLOURS)) >= len(METHODS)
    assert len(set(figures._MARKERS)) >= len(METHODS)
