"""The recipe for ensembles from one network: attacks that are not weakened, measures, members, command line."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.memory import LiveMemory
from recipes.common.data import DATASETS, load_task
from recipes.common.networks import digits_mlp, vgg_small
from recipes.common.process_memory import give_back
from recipes.common.training import accuracy, steps_an_epoch
from recipes.diversity import command as diversity
from recipes.diversity.attacks import Joint, Pixels, auto_attack, pgd
from recipes.diversity.baselines import train_network
from recipes.diversity.ensembles import SPENT, build_ensemble
from recipes.diversity.measures import (
    Votes,
    activation_norms,
    coherence,
    distance,
    diversity_scores,
)
from recipes.diversity.networks import NETWORKS
from recipes.diversity.settings import PATHS, WAYS, Settings
from recipes.diversity.withstand import Withstand

INFO = DATASETS["digits"]
SETTINGS = replace(
    NETWORKS["digits-mlp"].settings,
    members=3,
    straight_away=6,
    straight_between=2,
    away=6,
    between=2,
    epochs=5,
    cycle_epochs=0.2,
)


@pytest.fixture(scope="module")
def task():
    return load_task("digits")


@pytest.fixture(scope="module")
def start(task):
    return train_network(digits_mlp, task, replace(SETTINGS, epochs=20), augment=None, seed=0)


@pytest.fixture(scope="module")
def images(task):
    return INFO.pixels(task.test_inputs[:100]), task.test_labels[:100]


def right(model, x, y):
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).double().mean())


class TestAttacks:
    def test_pixels_undo_the_normalisation(self, task, start, images):
        assert images[0].min() == 0
        assert images[0].max() == 1
        assert torch.allclose(
            Pixels(start, INFO)(images[0]), start(task.test_inputs[:100]), atol=1e-4
        )

    def test_a_large_attack_leaves_an_ordinary_network_nothing(self, start, images):
        model = Pixels(start, INFO).eval()
        assert right(model, *images) > 95
        assert right(model, pgd(model, *images, 0.4), images[1]) <= 1

    def test_a_large_attack_leaves_an_ensemble_nothing(self, task, start, images):
        other = train_network(digits_mlp, task, SETTINGS, augment=None, seed=7)
        joint = Joint([Pixels(start, INFO), Pixels(other, INFO)]).eval()
        assert right(joint, pgd(joint, *images, 0.4), images[1]) <= 1

    def test_the_attacked_images_stay_in_the_ball_and_in_range(self, start, images):
        found = pgd(Pixels(start, INFO), *images, 0.1, steps=5)
        assert (found - images[0]).abs().max() <= 0.1 + 1e-6
        assert found.min() >= 0
        assert found.max() <= 1

    @pytest.mark.parametrize("attack", [pgd, lambda *a: auto_attack(*a, classes=10)])
    def test_an_eps_of_zero_is_clean_exactly(self, start, images, attack):
        found = attack(Pixels(start, INFO), *images, 0.0)
        assert torch.equal(found, images[0])
        assert found is not images[0]

    def test_restarts_never_lower_the_loss(self, start, images):
        model = Pixels(start, INFO).eval()

        def losses(restarts):
            found = pgd(model, *images, 0.1, steps=3, restarts=restarts)
            return F.cross_entropy(model(found), images[1], reduction="none")

        once, thrice = losses(1), losses(3)
        assert bool((thrice >= once - 1e-6).all())
        assert float(thrice.sum()) > float(once.sum())

    def test_auto_attack_is_at_least_as_strong(self, start, images):
        model = Pixels(start, INFO).eval()
        x, y = images[0][:30], images[1][:30]
        weak = right(model, pgd(model, x, y, 0.1), y)
        assert right(model, auto_attack(model, x, y, 0.1, classes=10), y) <= weak + 1e-9

    @pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
    def test_images_outside_the_range_are_refused(self, start, images, value):
        x = images[0].clone()
        x[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match=r"images: must be in \[0, 1\].*normalisation"):
            pgd(Pixels(start, INFO), x, images[1], 0.1)

    @pytest.mark.parametrize(
        ("options", "named"),
        [({"eps": -0.1}, "eps"), ({"eps": 8.0}, "eps"), ({"eps": 0.1, "steps": 0}, "steps")],
    )
    def test_a_setting_out_of_range_is_named(self, start, images, options, named):
        with pytest.raises(ValueError, match=f"^{named}: "):
            pgd(Pixels(start, INFO), *images, **options)

    def test_the_model_is_left_in_its_mode(self, start, images):
        model = Pixels(start, INFO).train()
        pgd(model, *images, 0.1, steps=2, restarts=2)
        assert model.training
        model.eval()

    def test_the_joint_output_is_the_logarithm_of_the_mean_probability(self, images):
        torch.manual_seed(0)
        members = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(3)]
        expected = torch.stack([m(images[0]).softmax(1) for m in members]).mean(0)
        assert torch.allclose(Joint(members)(images[0]).exp(), expected, atol=1e-6)


class TestMeasures:
    def test_votes(self):
        votes = Votes(torch.tensor([0, 1, 1, 0]))
        votes.add(torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.1, 0.9]]))  # 0 1 0 1
        votes.add(torch.tensor([[0.4, 0.6], [0.4, 0.6], [0.1, 0.9], [0.2, 0.8]]))  # 1 1 1 1
        assert votes.accuracies == [50.0, 50.0]
        assert votes.mean == 50.0
        assert votes.joint == 75.0  # 0 1 1 1
        assert votes.disagreement == 50.0

    def test_activation_norms_and_their_deviation(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU())
        images = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 1.0]]]])
        norms = []
        for scale in (1.0, 3.0):
            model[1].weight.data = scale * torch.eye(2)
            norms.append(activation_norms(model, images))
        assert torch.allclose(norms[0], torch.tensor([[5.0, 1.0]]))
        # Deviations of (5, 15) and (1, 3) with n - 1, and their mean.
        expected = (10 / math.sqrt(2) + 2 / math.sqrt(2)) / 2
        assert diversity_scores(norms) == [pytest.approx(expected)]

    def test_coherence_of_a_network_with_itself_is_one_and_with_its_opposite_minus_one(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        opposite = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        opposite[1].weight.data = -model[1].weight.data
        x, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 0, 1, 1])
        assert torch.allclose(coherence(model, model, x, y), torch.ones(5).double())
        assert torch.allclose(coherence(model, opposite, x, y), -torch.ones(5).double())

    def test_coherence_of_certain_predictions_is_known_and_without_gradient_zero(self):
        sure = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        sure[1].weight.data = torch.tensor([[20.0, 0, 0, 0], [-20.0, 0, 0, 0]])
        x, y = torch.ones(1, 1, 2, 2), torch.tensor([0])
        assert coherence(sure, sure, x, y).item() == pytest.approx(1.0)
        sure[1].weight.data *= 1e4  # softmax is exactly 1
        assert coherence(sure, sure, x, y).item() == 0.0


class TestWithstand:
    @staticmethod
    def objective(model, start, task, **options):
        batches = [(task.train_inputs[:50], options.pop("labels", None))]
        others = options.pop("others", ())
        generator = torch.Generator().manual_seed(0)
        return Withstand(
            model, start, others, batches, info=INFO, generator=generator, **{"eps": 0.2} | options
        )

    def test_is_the_divergence_from_what_the_images_are_without_the_attack(self, start, task):
        model = digits_mlp()
        x = task.train_inputs[:50]
        p, q = start(x).softmax(1), model(x).softmax(1)
        expected = (p * (p / q).log()).sum(1).mean()
        found = self.objective(model, start, task, eps=0.0)()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    def test_attacks_of_the_start_network_move_itself(self, start, task):
        assert self.objective(start, start, task, eps=0.0)().item() == pytest.approx(0, abs=1e-6)
        attacked = self.objective(start, start, task)
        assert sum(attacked().item() for _ in range(10)) > 0.5

    def test_reads_no_label_and_moves_nothing_but_the_model(self, start, task):
        model, start = copy.deepcopy(start), copy.deepcopy(start)
        start.zero_grad()
        value = self.objective(model, start, task)()
        assert value == self.objective(model, start, task, labels="none of these")()
        value.backward()
        assert all(p.grad is not None for p in model.parameters())
        assert all(p.grad is None for p in start.parameters())

    def test_others_are_attacked_too(self, start, task):
        torch.manual_seed(1)
        alone = self.objective(start, start, task)
        more = self.objective(start, start, task, others=[digits_mlp()])
        # An untrained network's attacks hardly move the start network.
        assert sum(more().item() for _ in range(10)) < 0.8 * sum(alone().item() for _ in range(10))

    def test_attacks_as_well_in_bfloat16(self, start, task):
        objectives = [self.objective(start, start, task, autocast=how) for how in (False, True)]
        full, half = (sum(o().item() for _ in range(10)) for o in objectives)
        assert half == pytest.approx(full, rel=0.1)
        assert half != full


class TestEnsembles:
    @pytest.mark.parametrize("way", [way for way in WAYS if way != "noise"])
    def test_members_are_as_many_as_asked_and_differ(self, way, start, task, tmp_path):
        before = {name: t.clone() for name, t in start.state_dict().items()}
        ensemble = build_ensemble(
            way, start, digits_mlp, task, SETTINGS, folder=tmp_path, augment=None, seed=0
        )
        distances = [distance(member, start) for member in ensemble]
        assert len(distances) == len(ensemble) == 3
        assert min(distances) > 0
        assert len(set(distances)) == 3
        assert all(torch.equal(t, before[name]) for name, t in start.state_dict().items())
        assert ensemble.seconds > 0

    def test_independent_networks_of_an_interrupted_run_are_kept(self, start, task, tmp_path):
        def interrupted(after):
            steps = 0

            def progress(taken, text):
                nonlocal steps
                steps += taken
                if steps == after:
                    raise KeyboardInterrupt

            return progress

        def build(folder, **options):
            return build_ensemble(
                "independent",
                start,
                digits_mlp,
                task,
                SETTINGS,
                folder=tmp_path / folder,
                augment=None,
                seed=0,
                **options,
            )

        each = SETTINGS.epochs * steps_an_epoch(task, SETTINGS.batch_size)
        with pytest.raises(KeyboardInterrupt):
            build("cut", progress=interrupted(each + 3))

        def spent():
            return json.loads((tmp_path / "cut" / SPENT).read_text())["seconds"]

        (first,) = spent()
        taken: list[int] = []
        ensemble = build("cut", resume=True, progress=lambda steps, text: taken.append(steps))
        assert sum(taken) == 2 * each
        assert spent()[0] == first
        assert ensemble.seconds == sum(spent())
        for found, expected in zip(ensemble, build("whole"), strict=True):
            for name, tensor in expected.state_dict().items():
                assert torch.equal(found.state_dict()[name], tensor)
        taken.clear()
        build("cut", progress=lambda steps, text: taken.append(steps))
        assert sum(taken) == 3 * each

    @pytest.mark.parametrize("way", ["misalign", "withstand", "distillation", "adversarial"])
    def test_anchors_and_objectives_see_what_training_sees(self, way, start, task, tmp_path):
        seen = set()

        def augment(inputs):
            seen.add(len(inputs))
            return inputs

        settings = replace(SETTINGS, anchor_batch=40, objective_batch=30)
        build_ensemble(
            way, start, digits_mlp, task, settings, folder=tmp_path, augment=augment, seed=0
        )
        assert {40, 30} <= seen

    def test_a_path_without_objective_goes_on_and_keeps_the_function(self, start, task, tmp_path):
        settings = replace(SETTINGS, straight_away=30, straight_eps=0.1, away=0, between=0)
        ensemble = build_ensemble(
            "none", start, digits_mlp, task, settings, folder=tmp_path, augment=None, seed=0
        )
        walked = [
            (distance(m, start), length)
            for m, length in zip(ensemble, ensemble.lengths, strict=True)
        ]
        assert all(far > 0.7 * length for far, length in walked)
        kept = [accuracy(m, task.train_inputs, task.train_labels) for m in ensemble]
        assert min(kept) > accuracy(start, task.train_inputs, task.train_labels) - 1

    def test_noise_is_as_long_as_told(self, start, task, tmp_path):
        ensemble = build_ensemble(
            "noise",
            start,
            digits_mlp,
            task,
            SETTINGS,
            folder=tmp_path,
            augment=None,
            distances=[0.5, 1.0, 2.0],
            seed=0,
        )
        found = [distance(member, start) for member in ensemble]
        assert found == [pytest.approx(d, rel=1e-4) for d in (0.5, 1.0, 2.0)]

    def test_input_gradients_turn_away(self, start, task, tmp_path, images):
        def mean_coherence(way):
            settings = replace(SETTINGS, away=60, beta=100.0)
            ensemble = build_ensemble(
                way, start, digits_mlp, task, settings, folder=tmp_path, augment=None, seed=0
            )
            return sum(float(coherence(m, start, x, y).mean()) for m in ensemble) / 3

        x, y = task.test_inputs[:100], task.test_labels[:100]
        turned, straight = mean_coherence("misalign"), mean_coherence("none")
        assert turned < straight - 0.2

    def test_what_fools_the_start_network_is_withstood(self, start, task, tmp_path, images):
        x, y = images
        attacked = INFO.normalized(pgd(Pixels(start, INFO).eval(), x, y, 0.15))
        # So many steps that members settle: with fewer one is an image to either side of the bounds, by rounding.
        settings = replace(SETTINGS, away=200, between=100)
        ensemble = build_ensemble(
            "withstand", start, digits_mlp, task, settings, folder=tmp_path, augment=None, seed=0
        )
        assert accuracy(start, attacked, y) < 40
        for member in ensemble:
            assert accuracy(member, attacked, y) > 70
            clean = accuracy(member, task.test_inputs, task.test_labels)
            assert clean > accuracy(start, task.test_inputs, task.test_labels) - 2

    def test_ten_members_take_no_more_memory_than_three(self, start, task, tmp_path):
        def peak(members):
            settings = replace(SETTINGS, members=members, straight_away=2, straight_between=1)
            with LiveMemory() as memory:
                ensemble = build_ensemble(
                    "none", start, digits_mlp, task, settings, folder=tmp_path, augment=None, seed=0
                )
                for member in ensemble:
                    accuracy(member, task.test_inputs, task.test_labels)
            return memory.peak

        assert peak(10) == pytest.approx(peak(3), rel=0.01)

    def test_freed_memory_goes_back_to_the_system(self):
        def resident():
            return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

        held = [torch.ones(16_000) for _ in range(4000)]  # 256 MB in blocks that the heap keeps
        before = resident()
        held = held[::100]
        assert not give_back(1)
        assert give_back()
        assert resident() < before - 2e8
        assert len(held) == 40

    def test_bad_input_is_named(self, start, task, tmp_path):
        def build(way, members):
            build_ensemble(
                way,
                start,
                digits_mlp,
                task,
                replace(SETTINGS, members=members),
                folder=tmp_path,
                augment=None,
                seed=0,
            )

        with pytest.raises(ValueError, match="members: an ensemble has two or more, got 1"):
            build("none", 1)
        with pytest.raises(ValueError, match="'magic' is unknown; choose from none, misalign"):
            build("magic", 3)

    def test_vgg_small_takes_photographs(self):
        assert vgg_small()(torch.rand(2, 3, 32, 32)).shape == (2, 10)


SHORT = ["--members", "2", "--away", "3", "--between", "1", "--epochs", "3", "--attack-steps", "2"]
SHORT += ["--attack-images", "40", "--white-box-images", "20", "--auto-attack-images", "0"]
SHORT += ["--straight-away", "3", "--straight-between", "1"]
SHORT += ["--cycle-epochs", "0.1", "--no-progress"]


def test_the_recipe_leaves_results_members_and_plots_and_resumes(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), *SHORT, "--seeds", "0", "1"]
    assert diversity.main([*arguments, "--objective", "none", "--baseline", "noise"]) == 0
    everything = [*arguments, "--objective", *PATHS, "--baseline", "all"]
    kept = (tmp_path / "seed-0" / "none.json").stat().st_mtime_ns
    capsys.readouterr()
    assert diversity.main([*everything, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "seed 0, path, misaligned" in out
    assert "seed 0, path, L = 0" not in out  # it was finished
    assert (tmp_path / "seed-0" / "none.json").stat().st_mtime_ns == kept
    found = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert list(found["ensembles"]) == list(WAYS)
    path = found["ensembles"]["none"]
    assert 0 <= path["transfer_joint_0.1"] <= 100
    assert path["intervals_95"]["clean_joint"] >= 0
    assert len(path["diversity_by_layer"]) == 3
    for name in ("attacks", "coherence", "layers", "weights", "pictures"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0
    digits_mlp().load_state_dict(load_file(tmp_path / "seed-1" / "fge" / "member-001.safetensors"))
    with pytest.raises(SystemExit):
        diversity.main([*everything, "--resume", "--beta", "3"])
    assert "another configuration (beta " in capsys.readouterr().err


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        diversity.main([*arguments, "--resume"])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def killed(*args, **keywords):
    raise KeyboardInterrupt


def test_later_seeds_of_an_earlier_run_are_not_taken_for_those_of_a_killed_one(
    tmp_path, monkeypatch
):
    def arguments(name, *options):
        ways = ["--objective", "withstand", "--baseline", "--seeds", "0", "1"]
        return ["--out", str(tmp_path / name), *SHORT, *ways, *options]

    assert diversity.main(arguments("both", "--withstand-beta", "1", "--epochs", "2")) == 0
    with monkeypatch.context() as patch:
        patch.setattr("recipes.diversity.experiment.build_ensemble", killed)
        assert diversity.main(arguments("both")) == 130
    assert diversity.main(arguments("both", "--resume")) == 0
    assert diversity.main(arguments("alone")) == 0
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
        ways = ["--objective", "none", "--baseline", "independent"]
        return ["--out", str(tmp_path / name), *SHORT, *ways, *options]

    assert diversity.main(arguments("a", "--epochs", "2")) == 0
    assert diversity.main(arguments("b")) == 0
    theirs, ours = (tmp_path / name / "seed-0" for name in ("a", "b"))
    for name in (
        "start.json",
        "start.safetensors",
        "attacked.safetensors",
        "none.json",
        "none/member-001.safetensors",
        "independent/member-000.safetensors",
        f"independent/{SPENT}",
    ):
        own = (ours / name).read_bytes()
        (ours / name).write_bytes((theirs / name).read_bytes())
        error = refusal(capsys, *arguments("b"))
        assert str(ours / name) in error
        assert "another configuration (epochs 2 there, 3 asked for)" in error
        (ours / name).write_bytes(own)
    # Members of an ensemble that was not finished are no others' either.
    (ours / "independent.json").unlink()
    (theirs / "independent").rename(ours / "independent-theirs")
    (ours / "independent").rename(ours / "independent-ours")
    (ours / "independent-theirs").rename(ours / "independent")
    assert "epochs 2 there, 3 asked for" in refusal(capsys, *arguments("b"))


def test_an_interruption_between_the_attacks_and_their_record_is_made_good(tmp_path):
    out = ["--out", str(tmp_path), *SHORT, "--objective", "none", "--baseline"]
    assert diversity.main(out) == 0
    record = tmp_path / "seed-0" / "start.json"
    whole = json.loads(record.read_text())
    record.write_text(json.dumps({k: v for k, v in whole.items() if k != "transfer"}))
    (tmp_path / "seed-0" / "none.json").unlink()
    assert diversity.main([*out, "--resume"]) == 0
    assert json.loads(record.read_text())["transfer"] == whole["transfer"]


def test_a_checkpoint_is_the_one_whose_content_it_is(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file(digits_mlp().state_dict(), tmp_path / folder / "start.safetensors")

    def arguments(folder):
        out = ["--checkpoint", str(tmp_path / folder / "start.safetensors")]
        out += ["--out", str(tmp_path / "out"), "--objective", "none", "--baseline"]
        return [*out, *SHORT]

    assert diversity.main(arguments("a")) == 0
    assert "another configuration (checkpoint_sha256" in refusal(capsys, *arguments("b"))


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
    torch.save(digits_mlp().state_dict(), path)  # a state dict that torch saved is taken
    out = ["--out", str(tmp_path / "out"), "--objective", "none", "--baseline"]
    assert diversity.main(["--checkpoint", str(path), *out, *SHORT]) == 0


def test_sizes_of_attacks_that_the_results_would_call_the_same_are_one(tmp_path):
    out = ["--out", str(tmp_path), *SHORT, "--objective", "none", "--baseline"]
    sizes = ["--attack-eps", "0.1", "0.10000000001", "0.1", "0.2", "--table-eps", "0.1"]
    assert diversity.main([*out, *sizes]) == 0
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
        diversity.main(["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/seed-*/*"))


def test_the_defaults_have_settings_that_can_be_built():
    for network in NETWORKS.values():
        assert isinstance(network.settings, Settings)
        assert network.attacks.table_eps in network.attacks.attack_eps
