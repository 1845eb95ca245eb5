"""Members of ensembles: their number, distances, accuracy and robustness to attacks."""

import json

import pytest
import torch
from diversity_cases import INFO, SETTINGS

from benchmarks.memory import LiveMemory
from recipes.common.networks import digits_mlp
from recipes.common.training import accuracy, steps_an_epoch
from recipes.diversity.attacks import Pixels, pgd
from recipes.diversity.ensembles import SECONDS_FILE, build_ensemble
from recipes.diversity.measures import coherence, distance
from recipes.diversity.methods import METHODS


@pytest.mark.parametrize("method", [name for name in METHODS if name != "noise"])
def test_members_are_as_many_as_asked_and_differ(method, start, task, tmp_path):
    before = {name: t.clone() for name, t in start.state_dict().items()}
    ensemble = build_ensemble(
        method, start, digits_mlp, task, SETTINGS, folder=tmp_path, augment=None, seed=0
    )
    distances = [distance(member, start) for member in ensemble]
    assert len(distances) == len(ensemble) == 3
    assert min(distances) > 0
    assert len(set(distances)) == 3
    assert all(torch.equal(t, before[name]) for name, t in start.state_dict().items())
    assert ensemble.seconds > 0


def test_independent_networks_of_an_interrupted_run_are_kept(start, task, tmp_path):
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
        return json.loads((tmp_path / "cut" / SECONDS_FILE).read_text())["seconds"]

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


@pytest.mark.parametrize("method", ["misalign", "withstand", "distillation", "adversarial"])
def test_anchors_and_objectives_see_the_augmented_training_images(method, start, task, tmp_path):
    seen = set()

    def augment(inputs):
        seen.add(len(inputs))
        return inputs

    settings = SETTINGS.changed(anchor_batch=40, objective_batch=30)
    build_ensemble(
        method, start, digits_mlp, task, settings, folder=tmp_path, augment=augment, seed=0
    )
    assert {40, 30} <= seen


def test_a_path_without_objective_goes_on_and_keeps_the_function(start, task, tmp_path):
    settings = SETTINGS.changed(straight_away=30, straight_eps=0.1, away=0, between=0)
    ensemble = build_ensemble(
        "none", start, digits_mlp, task, settings, folder=tmp_path, augment=None, seed=0
    )
    walked = [
        (distance(m, start), length) for m, length in zip(ensemble, ensemble.lengths, strict=True)
    ]
    assert all(far > 0.7 * length for far, length in walked)
    kept = [accuracy(m, task.train_inputs, task.train_labels) for m in ensemble]
    assert min(kept) > accuracy(start, task.train_inputs, task.train_labels) - 1


def test_a_path_far_away_walks_far_and_keeps_the_function(start, task, tmp_path):
    settings = SETTINGS.changed(away=300, between=30)
    ensemble = build_ensemble(
        "far", start, digits_mlp, task, settings, folder=tmp_path, augment=None, seed=0
    )
    weights = sum(float(p.square().sum()) for p in start.parameters()) ** 0.5
    members = list(ensemble)
    assert min(distance(m, start) for m in members) > weights
    assert min(distance(a, b) for a, b in zip(members, members[1:], strict=False)) > 0
    kept = [accuracy(m, task.train_inputs, task.train_labels) for m in members]
    assert min(kept) > accuracy(start, task.train_inputs, task.train_labels) - 1


def test_noise_members_are_at_the_distances_asked_for(start, task, tmp_path):
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


def test_the_misalign_objective_turns_input_gradients_away_from_the_start_network(
    start, task, tmp_path, images
):
    def mean_coherence(method):
        settings = SETTINGS.changed(away=60, beta=100.0)
        ensemble = build_ensemble(
            method, start, digits_mlp, task, settings, folder=tmp_path, augment=None, seed=0
        )
        return sum(float(coherence(m, start, x, y).mean()) for m in ensemble) / 3

    x, y = task.test_inputs[:100], task.test_labels[:100]
    turned, straight = mean_coherence("misalign"), mean_coherence("none")
    assert turned < straight - 0.2


def test_the_withstand_members_resist_attacks_on_the_start_network(start, task, tmp_path, images):
    x, y = images
    attacked = INFO.normalized(pgd(Pixels(start, INFO).eval(), x, y, 0.15))
    # The members settle with this many steps. With fewer, rounding moves one across the bounds by an image.
    settings = SETTINGS.changed(away=200, between=100)
    ensemble = build_ensemble(
        "withstand", start, digits_mlp, task, settings, folder=tmp_path, augment=None, seed=0
    )
    assert accuracy(start, attacked, y) < 40
    for member in ensemble:
        assert accuracy(member, attacked, y) > 70
        clean = accuracy(member, task.test_inputs, task.test_labels)
        assert clean > accuracy(start, task.test_inputs, task.test_labels) - 2


def test_ten_members_take_no_more_memory_than_three(start, task, tmp_path):
    def peak(members):
        settings = SETTINGS.changed(members=members, straight_away=2, straight_between=1)
        with LiveMemory() as memory:
            ensemble = build_ensemble(
                "none", start, digits_mlp, task, settings, folder=tmp_path, augment=None, seed=0
            )
            for member in ensemble:
                accuracy(member, task.test_inputs, task.test_labels)
        return memory.peak

    assert peak(10) == pytest.approx(peak(3), rel=0.01)


def test_bad_input_is_named(start, task, tmp_path):
    def build(method, members):
        build_ensemble(
            method,
            start,
            digits_mlp,
            task,
            SETTINGS.changed(members=members),
            folder=tmp_path,
            augment=None,
            seed=0,
        )

    with pytest.raises(ValueError, match="members: an ensemble has two or more, got 1"):
        build("none", 1)
    with pytest.raises(ValueError, match="'magic' is unknown; choose from none, far, misalign"):
        build("magic", 3)
