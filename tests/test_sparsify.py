"""recipes.sparsify: the masks, the methods, and the recipe from its command line to its files."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from matplotlib.text import Text
from safetensors.torch import load_file, save_file
from torch import nn

from fipoptim import AnchorBatch, AnchorMetric
from recipes.common.augment import augmentation
from recipes.common.data import DATASETS, load_task
from recipes.common.networks import digits_mlp, lenet_300_100, resnet20
from recipes.sparsify import command as sparsify
from recipes.sparsify import experiment as sparsify_experiment
from recipes.sparsify import export as sparse_export
from recipes.sparsify import figures as sparsify_figures
from recipes.sparsify import pruning
from recipes.sparsify import tables as sparsify_tables
from recipes.sparsify.masks import MaskedWeights
from recipes.sparsify.networks import NETWORKS, load_dense, train_dense
from recipes.sparsify.pruning import METHODS, Dense, Settings, legs, softened, title
from recipes.sparsify.waypoints import stages

NAMES = ("1.weight", "3.weight", "5.weight")
TOTAL = 64 * 128 + 128 * 64 + 64 * 10
SETTINGS = Settings(
    epochs=2,
    batch_size=64,
    lr=1e-2,
    baseline_epochs=2,
    baseline_lr=5e-3,
    probes=2,
    metric_decay=0.5,
)
SHORT = [
    *("--sparsity", "0.5", "0.9", "--epochs", "1", "--baseline-epochs", "1", "--no-progress"),
    *("--probes", "1", "--products", "0"),
]


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


@pytest.fixture(scope="module")
def dense(digits):
    """A start network that has learned a little."""
    network = NETWORKS["digits-mlp"]
    short = replace(network, dense_epochs=4, dense_batch_size=64)
    return train_dense(short, digits, augment=None, autocast=False, seed=0)


@pytest.fixture
def short_dense(monkeypatch):
    """The command line's networks, trained for two epochs."""
    for name, network in NETWORKS.items():
        monkeypatch.setitem(NETWORKS, name, replace(network, dense_epochs=2))


# Masks


def some_masks(model, share=0.5):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(model.get_parameter(n).shape, generator=generator) > share for n in NAMES}


def test_held_weights_are_zero_and_stay_there():
    model = digits_mlp()
    kept = some_masks(model)
    held = MaskedWeights(model, NAMES)
    held.hold(kept)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 1, 8, 8)).square().sum().backward()
        optimizer.step()
    state = held.state()
    for name in NAMES:
        assert bool((state[name][~kept[name]] == 0).all())
        assert not bool(torch.signbit(state[name][~kept[name]]).any())  # no negative zeros
        assert bool((state[name][kept[name]] != 0).any())
        assert torch.equal(held.masks[name], kept[name])


def test_the_state_loads_into_the_plain_model_and_computes_the_same():
    model, inputs = resnet20().eval(), torch.randn(2, 3, 32, 32)
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    before = model(inputs)
    held = MaskedWeights(model, names)
    torch.testing.assert_close(model(inputs), before)
    held.hold({n: torch.rand(p.shape) > 0.3 for n, p in held.parameters.items()})
    plain = resnet20().eval()
    plain.load_state_dict(held.state())
    torch.testing.assert_close(plain(inputs), model(inputs))


def test_other_weights_can_be_put_in():
    model, other = digits_mlp(), digits_mlp().state_dict()
    kept = some_masks(model)
    held = MaskedWeights(model, NAMES)
    held.hold_only(kept, other)
    for name, tensor in held.state().items():
        assert torch.equal(
            tensor,
            tensor.new_zeros(()).where(~kept[name], other[name]) if name in NAMES else other[name],
        )


def test_the_metric_has_no_say_on_held_weights():
    model = digits_mlp()
    kept = some_masks(model)
    held = MaskedWeights(model, NAMES)
    held.hold(kept)
    metric = AnchorMetric(AnchorBatch(model, torch.randn(5, 1, 8, 8)))
    diagonal = dict(zip(metric.names, metric.unflatten(metric.diagonal(4)), strict=True))
    for name in NAMES:
        part = diagonal[MaskedWeights.inner_name(name)]
        assert bool((part[~held.masks[name]] == 0).all())
        assert bool((part[held.masks[name]] > 0).any())


# Methods


def test_softened_outputs_measure_fisher_distance_and_have_finite_derivatives():
    z = torch.tensor([[1.0, -2.0, 0.5], [900.0, -900.0, 0.0]], requires_grad=True)
    out = softened(4.0)(z)
    torch.testing.assert_close(out.square().sum(1), torch.full((2,), 64.0))  # |2 T √p|² = 4 T²
    torch.testing.assert_close(out[0], 8 * (z[0] / 4).softmax(0).sqrt())
    out.sum().backward()
    assert bool(torch.isfinite(z.grad).all())


def test_layered_magnitude_is_lamp():
    weight = torch.tensor([[3.0, -1.0], [2.0, 0.0]])
    expected = torch.tensor([[1.0, 1 / 14], [4 / 13, 0.0]])
    torch.testing.assert_close(pruning._layered_magnitude(weight), expected)


def test_rounds_prune_no_more_than_their_share():
    rounds = pruning._rounds([0.2, 0.9, 0.994])
    assert [r for r in rounds if r in (0.2, 0.9, 0.994)] == [0.2, 0.9, 0.994]
    left = [1.0, *(1 - r for r in rounds)]
    assert all(b / a >= 1 - pruning.ROUND - 1e-9 for a, b in itertools.pairwise(left))


DEFAULTS = [list(network.sparsities) for network in NETWORKS.values()]


@pytest.mark.parametrize(
    "asked",
    [[s] for s in (0.0, 0.3, 0.5, 0.9, 0.93, 0.95, 0.98, 0.994, 0.9999)]
    + [[0.5, 0.994], [0.9, 0.994], [0.2, 0.93, 0.98], [0.0, 0.999]],
)
def test_no_stage_of_the_way_is_too_long(asked):
    way = stages(asked)
    assert [part[-1] for part in way] == asked  # exactly, and reported from there
    visited = [sparsity for part in way for sparsity in part]
    assert visited == sorted(set(visited))
    here = 0.0
    for sparsity in visited:
        share = (sparsity - here) / (1 - here)
        assert sparsity <= 0.93 + 1e-9 or share <= 0.6 + 1e-9
        here = sparsity
    # As few as there can be: with one less some stage would be longer.
    begun = 0.0
    for part, wanted in zip(way, asked, strict=True):
        least = max(
            1, math.ceil(math.log((1 - wanted) / min(1 - begun, 0.175)) / math.log(0.4) - 1e-9)
        )
        assert len(part) == least
        begun = wanted


def test_what_is_known_to_work_is_left_as_it_is():
    assert len(DEFAULTS) == 3
    for asked in DEFAULTS:
        assert stages(asked) == [[sparsity] for sparsity in asked]
    assert len(stages([0.994])[0]) == 4


@pytest.mark.parametrize("products", [0, 1])
def test_one_sparsity_gets_the_way_it_needs_by_itself(products, digits, dense):
    settings = replace(SETTINGS, products=products, epochs=1, eps=1.0)
    way = stages([0.98])[0]
    assert len(way) == 3
    seen = []
    alone, told, direct = (
        pruning.sparsify("fip", dense, digits, asked, how, augment=None, seed=0, progress=show)
        for asked, how, show in (
            ([0.98], settings, lambda n, text: seen.append(text)),
            (way, settings, lambda n, text: None),
            ([0.98], replace(settings, waypoints=False), lambda n, text: None),
        )
    )
    assert [n.wanted for n in alone.networks] == [0.98]  # waypoints are visited, not reported
    assert all(
        torch.equal(t, told.networks[-1].state[k]) for k, t in alone.networks[0].state.items()
    )
    assert not torch.equal(
        alone.networks[0].state["1.weight"], direct.networks[0].state["1.weight"]
    )
    assert alone.arrived == [len(alone.path) - 1]
    assert len(told.path) == len(alone.path) == 3 * (len(direct.path) - 1) + 1
    assert seen[0].startswith("1 of 3: ")
    assert seen[-1].startswith("3 of 3: 98.00% zeros")


def test_other_methods_get_as_many_epochs_as_the_stages_of_the_path():
    settings = replace(SETTINGS, epochs=5, baseline_epochs=8)
    for asked in ([0.994], [0.5, 0.994], [0.9, 0.95], *DEFAULTS):
        path = sum(leg.epochs for leg in legs("fip", asked, settings))
        count = sum(len(part) for part in stages(asked))
        assert path == 5 * count
        for method in METHODS:
            way = legs(method, asked, settings)
            assert [leg.sparsity for leg in way if leg.asked] == asked
            if method != "fip":
                assert sum(leg.epochs for leg in way) >= 8 * count
        direct = replace(settings, waypoints=False)
        assert [leg.sparsity for leg in legs("fip", asked, direct)] == asked


def test_the_plan_says_where_every_method_goes_and_for_how_long():
    settings = replace(SETTINGS, epochs=5, baseline_epochs=8)
    methods = ["fip", "gradual-distillation", "one-shot"]
    text = sparsify_tables.plan(methods, [0.5, 0.98], settings, rewinds=True)
    rows = [" ".join(line.split()) for line in text.splitlines()[2:]]
    assert rows == [
        "Adam on drift + distance 50, (91.51), (95.88), 98 4 x 5 = 20",
        "gradual, distilled 50, 98 32",
        "one-shot, labels 50, 98, each by itself 32",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_arrives_at_exactly_the_sparsity(method, digits, dense):
    before = {k: v.clone() for k, v in dense.model.state_dict().items()}
    steps = []
    run = pruning.sparsify(
        method,
        dense,
        digits,
        [0.5, 0.95],
        SETTINGS,
        augment=None,
        seed=3,
        progress=lambda n, text: steps.append(n),
    )
    assert sum(steps) == pruning.total_steps(method, digits, [0.5, 0.95], SETTINGS)
    for network, sparsity in zip(run.networks, (0.5, 0.95), strict=True):
        metrics = network.metrics()
        assert metrics["total"] == TOTAL
        assert metrics["nonzero"] == TOTAL - round(sparsity * TOTAL)
        assert sum(int((network.state[n] != 0).sum()) for n in NAMES) == metrics["nonzero"]
        plain = digits_mlp()
        plain.load_state_dict(network.state)
        right = (plain(digits.test_inputs).argmax(1) == digits.test_labels).double().mean()
        assert 100 * float(right) == pytest.approx(network.accuracy)
    assert all(torch.equal(v, before[k]) for k, v in dense.model.state_dict().items())
    arrived = [run.path[k] for k in run.arrived] if method == "fip" else []
    for flat, network in zip(arrived, run.networks, strict=False):
        assert torch.equal(flat, torch.cat([network.state[n].flatten() for n in NAMES]))
    again = pruning.sparsify(method, dense, digits, [0.5, 0.95], SETTINGS, augment=None, seed=3)
    for a, b in zip(run.networks, again.networks, strict=True):
        assert all(torch.equal(a.state[k], b.state[k]) for k in a.state)


def test_a_single_step_arrives_as_well(digits, dense):
    settings = replace(SETTINGS, epochs=1, batch_size=len(digits.train_inputs))
    run = pruning.sparsify("fip", dense, digits, [0.5, 0.9], settings, augment=None, seed=0)
    assert [n.zeros for n in run.networks] == [TOTAL // 2, round(0.9 * TOTAL)]


@pytest.mark.parametrize("products", [0, 2, "adaptive"])
def test_the_path_reads_no_label(products, digits, dense):
    settings = replace(SETTINGS, products=products, epochs=1, eps=1.5)
    shuffled = replace(digits, train_labels=digits.train_labels.flip(0))
    runs = [
        pruning.sparsify("fip", dense, task, [0.9], settings, augment=None, seed=0).networks[0]
        for task in (digits, shuffled)
    ]
    assert all(torch.equal(runs[0].state[k], runs[1].state[k]) for k in runs[0].state)
    assert runs[0].accuracy > 60  # the start network's function, from its outputs alone


def test_mirror_images_are_held_too_at_the_same_number_of_steps(digits, dense):
    settings = replace(SETTINGS, mirror=True, epochs=1)
    for method in ("fip", "gradual-distillation"):
        pruned = pruning._Pruning(method, dense, digits, settings, None, 0, lambda n, text: None)
        n = len(digits.train_inputs)
        assert torch.equal(pruned.inputs[n:], pruned.inputs[:n].flip(3))
        with torch.no_grad():
            assert torch.allclose(pruned.reference, dense.model(pruned.inputs), atol=1e-5)
        steps = pruning.total_steps(method, digits, [0.9], settings)
        plain = replace(settings, mirror=False)
        assert steps == pruning.total_steps(method, digits, [0.9], plain)
    labelled = pruning._Pruning("gradual", dense, digits, settings, None, 0, print)
    assert len(labelled.inputs) == n  # those that follow labels are augmented as they always were


def test_the_path_with_labels_reads_them(digits, dense):
    settings = replace(SETTINGS, labels=True, epochs=1)
    shuffled = replace(digits, train_labels=digits.train_labels.flip(0))
    runs = [
        pruning.sparsify("fip", dense, task, [0.9], settings, augment=None, seed=0).networks[0]
        for task in (digits, shuffled)
    ]
    assert not torch.equal(runs[0].state["1.weight"], runs[1].state["1.weight"])


def test_few_anchors_augmented_per_layer_and_kept_layers(digits, dense):
    settings = replace(
        SETTINGS,
        anchors=30,
        augment="all",
        per_layer=True,
        keep=("5",),
        products="adaptive",
        eps=1.0,
    )
    run = pruning.sparsify(
        "fip", dense, digits, [0.75], settings, augment=augmentation("digits"), seed=0
    )
    (network,) = run.networks
    assert network.per_layer == {"1.weight": 0.75, "3.weight": 0.75}
    assert bool((network.state["5.weight"] != 0).all())


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, bias=False),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def test_a_dense_network_with_convolutions_is_trained_and_resumed(tmp_path, monkeypatch):
    entry = replace(NETWORKS["digits-mlp"], build=small_cnn, dense_epochs=2)
    monkeypatch.setitem(NETWORKS, "digits-mlp", entry)
    arguments = ["--out", str(tmp_path), *SHORT, "--method"]
    assert sparsify.main([*arguments, "lottery-ticket"]) == 0
    before = load_file(tmp_path / "seed-0" / "dense.safetensors")
    assert sparsify.main([*arguments, "lottery-ticket", "one-shot", "--resume"]) == 0
    again = load_file(tmp_path / "seed-0" / "dense.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_a_checkpoint_with_convolutions_serves_several_seeds(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = small_cnn()
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    entry = replace(NETWORKS["digits-mlp"], build=small_cnn)
    monkeypatch.setitem(NETWORKS, "digits-mlp", entry)
    arguments = ["--checkpoint", str(tmp_path / "dense.safetensors"), "--out", str(tmp_path)]
    assert sparsify.main([*arguments, *SHORT, "--method", "fip", "--seeds", "0", "1"]) == 0
    for seed in (0, 1):
        found = load_file(tmp_path / f"seed-{seed}" / "dense.safetensors")
        assert all(torch.equal(found[name], t) for name, t in model.state_dict().items())


def test_batch_norm_and_bfloat16_go_together_with_the_path():
    torch.manual_seed(0)
    task = load_task("digits")
    task = replace(task, train_inputs=task.train_inputs[:64], train_labels=task.train_labels[:64])
    model = small_cnn()
    settings = replace(SETTINGS, autocast=True, augment="all", batch_size=32)
    run = pruning.sparsify(
        "fip", Dense(model, None), task, [0.8], settings, augment=augmentation("digits"), seed=0
    )
    assert run.networks[0].zeros == round(0.8 * (72 + 288 + 640))


def test_shifts_fill_with_black_and_keep_the_shape():
    torch.manual_seed(0)
    for name in ("digits", "mnist", "cifar10"):
        black = DATASETS[name].black
        inputs = black + torch.zeros(2, len(black), 9, 7)
        for _ in range(5):
            torch.testing.assert_close(augmentation(name)(inputs), inputs)
        inputs = torch.randn_like(inputs)
        views = [augmentation(name)(inputs) for _ in range(20)]
        assert all(v.shape == inputs.shape for v in views)
        assert any(not torch.equal(v, inputs) for v in views)


# What a method is called


def test_a_column_is_called_what_ran_in_it():
    def of(method, *, rewinds=True, **changes):
        return title(method, replace(SETTINGS, **changes), rewinds=rewinds)

    assert of("fip", products=0) == "Adam on drift + distance"
    assert of("fip", products=0, labels=True) == "Adam on drift + distance + labels"
    assert of("fip", products=2) == of("fip", products="adaptive") == "invariant path"
    assert of("fip", products="adaptive", labels=True) == "invariant path + labels"
    assert of("lottery-ticket") == "lottery ticket"
    assert of("lottery-ticket", rewinds=False) == "iterative, labels"  # nothing to go back to
    assert of("gradual-distillation", products=0) == "gradual, distilled"


def legends(monkeypatch):
    """The labels of what is drawn, by file."""
    found = {}

    def save(figure, path):
        texts = [t.get_text() for axes in figure.axes for t in axes.findobj(Text)]
        found[path.name] = texts
        sparsify_figures.plt.close(figure)

    monkeypatch.setattr(sparsify_figures, "_save", save)
    return found


@pytest.mark.parametrize(
    ("products", "name"), [("0", "Adam on drift + distance"), ("1", "invariant path")]
)
def test_tables_plots_and_results_call_the_path_what_ran(
    products, name, tmp_path, capsys, monkeypatch, short_dense
):
    drawn = legends(monkeypatch)
    arguments = ["--out", str(tmp_path), "--no-progress", "--sparsity", "0.5", "--epochs", "1"]
    arguments += ["--baseline-epochs", "1", "--method", "fip", "one-shot", "--probes", "1"]
    assert sparsify.main([*arguments, "--products", products]) == 0
    other = {"Adam on drift + distance", "invariant path"} - {name}
    printed = capsys.readouterr().out
    assert printed.count(name) == 3  # the plan, the run, the table
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["title"] == name
    assert metrics["baselines"]["one-shot"]["title"] == "one-shot, labels"
    assert name in drawn["accuracy.png"]
    assert name in drawn["weights.png"]
    everything = [printed, *map(str, drawn.values()), (tmp_path / "results.json").read_text()]
    assert not any(word in text for word in other for text in everything)


def test_a_lottery_ticket_from_a_checkpoint_is_none(tmp_path, capsys, dense):
    save_file(dense.model.state_dict(), tmp_path / "dense.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "dense.safetensors"), *SHORT]
    assert sparsify.main([*arguments, "--method", "lottery-ticket", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "iterative, labels" in printed
    assert "lottery ticket" not in printed


# On disk


def test_export_loads_again_and_is_smaller(tmp_path):
    model = digits_mlp()
    kept = some_masks(model, 0.95)
    held = MaskedWeights(model, NAMES)
    held.hold(kept)
    state = held.state()
    sizes = sparse_export.export(state, NAMES, tmp_path)
    assert sizes.compressed < sizes.dense / 5
    assert sizes.compressed == (tmp_path / "compressed.safetensors").stat().st_size
    digits_mlp().load_state_dict(load_file(tmp_path / "weights.safetensors"))
    masks = load_file(tmp_path / "masks.safetensors")
    back = sparse_export.load_compressed(tmp_path / "compressed.safetensors")
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)
        if name in NAMES:
            assert torch.equal(masks[name], tensor != 0)


def test_the_recipe_leaves_its_results(tmp_path, capsys, short_dense):
    arguments = ["--out", str(tmp_path), *SHORT, "--method", "all", "--export"]
    assert sparsify.main(arguments) == 0
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


def test_resume_keeps_what_is_finished_and_refuses_another_configuration(
    tmp_path, capsys, monkeypatch, short_dense
):
    arguments = ["--out", str(tmp_path), *SHORT, "--method", "fip", "gradual"]
    whole, real = tmp_path.parent / "whole", pruning.sparsify
    assert sparsify.main(["--out", str(whole), *arguments[2:]]) == 0

    def interrupted(method, *rest, **keywords):
        if method == "gradual":
            raise KeyboardInterrupt
        return real(method, *rest, **keywords)

    monkeypatch.setattr(sparsify_experiment, "sparsify", interrupted)
    assert sparsify.main(arguments) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
    taken = []

    def counting(method, *rest, **keywords):
        taken.append(method)
        return real(method, *rest, **keywords)

    monkeypatch.setattr(sparsify_experiment, "sparsify", counting)
    assert sparsify.main([*arguments, "--resume"]) == 0
    assert taken == ["gradual"]
    for name in ("fip-0.9", "gradual-0.9"):
        a, b = (load_file(f / "seed-0" / f"{name}.safetensors") for f in (tmp_path, whole))
        assert all(
            torch.equal(a[k], b[k]) for k in a
        )  # the same result as without the interruption
    # What was run on another machine says so.
    record = tmp_path / "seed-0" / "gradual.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "environment": {"cpu": "x"}}))
    assert sparsify.main([*arguments, "--resume"]) == 0
    assert taken == ["gradual"]
    found = json.loads((tmp_path / "results.json").read_text())["environment"]
    assert found["gradual"] == [{"cpu": "x"}]
    assert found["fip"][0]["torch"] == torch.__version__
    with pytest.raises(SystemExit):
        sparsify.main([*arguments, "--resume", "--beta", "7"])
    assert "beta 1.0 there, 7.0 asked for" in capsys.readouterr().err


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        sparsify.main([*arguments, "--resume"])
    assert stop.value.code == 2
    return capsys.readouterr().err


def killed(*args, **keywords):
    raise KeyboardInterrupt


def test_a_dense_network_serves_the_runs_that_agree_in_what_it_depends_on(
    tmp_path, capsys, monkeypatch, short_dense
):
    out = ["--out", str(tmp_path), *SHORT, "--method", "one-shot"]
    with monkeypatch.context() as patch:
        patch.setattr(sparsify_experiment, "sparsify", killed)
        assert sparsify.main([*out, "--validation", "0.2"]) == 130
    error = refusal(capsys, *out)
    assert "dense" in error
    assert "another configuration (validation 0.2 there, 0.0 asked for)" in error
    assert "autocast False there, True asked for" in refusal(capsys, *out, "--autocast")
    # Another sparsity and other settings of the methods are no other dense network.
    monkeypatch.setattr(sparsify_experiment, "train_dense", killed)
    other = ["--validation", "0.2", "--sparsity", "0.7", "--beta", "3", "--resume"]
    assert sparsify.main([*out, *other]) == 0
    # A dense network of another number of epochs, or of another seed.
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

    assert sparsify.main(arguments("a", "--beta", "7")) == 0
    assert sparsify.main(arguments("b")) == 0
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


def test_later_seeds_of_an_earlier_run_are_not_taken_for_those_of_a_killed_one(
    tmp_path, monkeypatch, short_dense
):
    def arguments(name, *options):
        out = ["--out", str(tmp_path / name), *SHORT, "--method", "fip", "--seeds", "0", "1"]
        return [*out, *options]

    assert sparsify.main(arguments("both", "--beta", "7")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(sparsify_experiment, "sparsify", killed)
        assert sparsify.main(arguments("both")) == 130
    assert sparsify.main(arguments("both", "--resume")) == 0
    assert sparsify.main(arguments("alone")) == 0
    for seed in (0, 1):
        here, there = (
            load_file(tmp_path / name / f"seed-{seed}" / "fip-0.9.safetensors")
            for name in ("both", "alone")
        )
        assert all(torch.equal(here[name], t) for name, t in there.items())


def test_two_checkpoints_of_one_name_are_two(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file(digits_mlp().state_dict(), tmp_path / folder / "dense.safetensors")

    def arguments(folder):
        checkpoint = tmp_path / folder / "dense.safetensors"
        out = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), *SHORT]
        return [*out, "--method", "one-shot"]

    assert sparsify.main(arguments("a")) == 0
    assert sparsify.main([*arguments("a"), "--resume"]) == 0
    error = refusal(capsys, *arguments("b"))
    assert "another configuration (checkpoint_sha256" in error


def test_sparsities_that_are_nearly_alike_have_files_of_their_own(tmp_path, short_dense):
    arguments = ["--out", str(tmp_path), *SHORT, "--method", "one-shot"]
    assert sparsify.main([*arguments, "--sparsity", "0.9", "0.9000001"]) == 0
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
        sparsify.main(["--checkpoint", str(path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"{path} cannot be read as weights" in error
    assert "weights_only" not in error  # nobody is told how to run it
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_is_the_start_network(tmp_path, dense, short_dense):
    save_file(dense.model.state_dict(), tmp_path / "dense.safetensors")
    torch.save(dense.model.state_dict(), tmp_path / "dense.pt")
    for name in ("dense.safetensors", "dense.pt"):
        loaded = load_dense(tmp_path / name, digits_mlp())
        assert loaded.early is None
        assert torch.equal(loaded.model[1].weight, dense.model[1].weight)
    arguments = ["--checkpoint", str(tmp_path / "dense.pt"), "--out", str(tmp_path / "out"), *SHORT]
    assert sparsify.main([*arguments, "--method", "lottery-ticket", "fip"]) == 0
    found = load_file(tmp_path / "out" / "seed-0" / "dense.safetensors")
    assert torch.equal(found["1.weight"], dense.model[1].weight)


# Bad input


def message_of(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        sparsify.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def untrained(monkeypatch):
    """Fails where anything is trained or loaded."""

    def fail(*args, **keywords):
        raise AssertionError("trained before the arguments were checked")

    monkeypatch.setattr(sparsify_experiment, "train_dense", fail)
    monkeypatch.setattr(sparsify_experiment, "sparsify", fail)


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
