"""The methods that learn the next task: their batches, limiting cases, and their memory of the earlier tasks."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from recipe_helpers import blobs
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from recipes.common.augment import many
from recipes.common.data import load_pair
from recipes.common.networks import digits_mlp
from recipes.common.training import minibatches, seed_everything, steps_an_epoch
from recipes.continual.methods import METHODS, make_learner, missing
from recipes.continual.methods.fip import PathOptions
from recipes.continual.settings import ContinualSettings

FROM_AVALANCHE = ("ewc", "gem", "lwf")
BATCH, EPOCHS = 64, 2


def tuned(method, **options):
    """Returns the options of a method, with those of the given options that it has."""
    kind = METHODS[method].options
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in options.items() if name in names})


def settings(anchors=20, **changes):
    methods = {name: tuned(name, lr=3e-3, strength=1.0) for name in METHODS}
    methods["fip"] = PathOptions(beta=10.0, eps=0.5, max_products=4)
    return ContinualSettings(anchors=anchors, methods=methods | changes)


@pytest.fixture(scope="module")
def tasks():
    return load_pair("digits-low", "digits-high")


def network(seed=0):
    seed_everything(seed)
    return digits_mlp(10)


def with_batch_norm():
    seed_everything(0)
    head = nn.Linear(32, 10)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), head)


def learnt(method, model, tasks, *, after_step=None, remembered=20, **changes):
    """Returns a copy of the model that has learnt the second task, and its learner."""
    low, high = tasks
    model = copy.deepcopy(model)
    made = make_learner(
        method, model, settings(**changes), augment=None, seed=0, freeze_batch_norm=True
    )
    made.remember(low.train_inputs[:remembered], low.train_labels[:remembered])
    seconds = made.learn(
        minibatches(high, batch_size=BATCH, epochs=EPOCHS, seed=1),
        steps=EPOCHS * steps_an_epoch(high, BATCH),
        after_step=after_step,
    )
    assert seconds > 0
    return model, made


def same(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("method", METHODS)
def test_after_step_is_called_after_every_step(method, tasks):
    steps: list[int] = []
    learnt(method, network(), tasks, after_step=steps.append)
    assert steps == list(range(1, EPOCHS * steps_an_epoch(tasks[1], BATCH) + 1))


@pytest.mark.parametrize("method", ["distillation", "dark-experience", "replay", "ewc", "lwf"])
def test_a_method_of_strength_zero_is_plain_training_bit_for_bit(method, tasks):
    # Batches, schedule and optimizer are the same, so only the term that holds the first task could differ.
    plain, _ = learnt("naive", network(), tasks)
    off = tuned(method, lr=3e-3, strength=0.0, label_strength=0.0)
    other, _ = learnt(method, network(), tasks, **{method: off})
    assert same(other, plain)


def test_gem_without_a_conflict_is_plain_training_bit_for_bit(tasks):
    # The remembered inputs are those of the new task, so their gradient agrees with that of every batch.
    _, high = tasks
    start, found = network(), []
    for method in ("naive", "gem"):
        model = copy.deepcopy(start)
        made = make_learner(method, model, settings(), augment=None, seed=0, freeze_batch_norm=True)
        made.remember(high.train_inputs, high.train_labels)
        made.learn(
            itertools.islice(minibatches(high, batch_size=200, epochs=1, seed=0), 3), steps=3
        )
        found.append(model)
    assert same(*found)


@pytest.mark.parametrize(
    "method", ["distillation", "dark-experience", "replay", "ewc", "gem", "lwf"]
)
def test_a_method_with_its_strength_is_not_plain_training(method, tasks):
    plain, _ = learnt("naive", network(), tasks)
    other, _ = learnt(method, network(), tasks)
    assert not same(other, plain)


def test_dark_experience_holds_outputs_and_relearns_labels_of_all_that_it_remembers(tasks):
    low, _ = tasks
    model = network()
    options = tuned("dark-experience", strength=0.3, label_strength=0.7)
    made = make_learner(
        "dark-experience",
        model,
        settings(**{"dark-experience": options}),
        augment=None,
        seed=0,
        freeze_batch_norm=True,
    )
    for part in (slice(0, 5), slice(5, 12)):
        made.remember(low.train_inputs[part], low.train_labels[part])
    x, y = low.train_inputs[:12], low.train_labels[:12]
    before = model(x).detach()
    with torch.no_grad():
        model[-1].bias.add_(torch.arange(10.0))
    after = model(x)
    drift = (after - before).square().sum(dim=1).mean()
    torch.testing.assert_close(made.holding()(), 0.3 * drift + 0.7 * F.cross_entropy(after, y))


@pytest.mark.parametrize("method", METHODS)
def test_frozen_batch_norm_stays_frozen(method, tasks):
    start = with_batch_norm()
    model, _ = learnt(method, start, tasks)
    assert not torch.equal(model[2].weight, start[2].weight)
    assert torch.equal(model[2].running_mean, start[2].running_mean)
    assert torch.equal(model[2].running_var, start[2].running_var)


def test_ewc_weighs_by_squared_gradients_of_single_inputs(tasks):
    low, _ = tasks
    model = network()
    made = make_learner("ewc", model, settings(), augment=None, seed=0, freeze_batch_norm=True)
    x, y = low.train_inputs[:7], low.train_labels[:7]
    made.remember(x, y)
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for k in range(7):
        loss = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
        for total, g in zip(
            expected, torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            total += g.square() / 7
    found = [data.data for data in made.plugin.importances[0].values()]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_a_third_task_adds_to_what_is_remembered(method, tasks):
    low, high = tasks
    model, made = learnt(method, network(), tasks)
    once = made.remembered_bytes()
    made.remember(high.train_inputs[:20], high.train_labels[:20])
    twice = made.remembered_bytes()
    if method == "naive":
        assert once == twice == 0
    elif method == "lwf":  # lwf remembers one network, the last
        assert once == twice == sum(p.nbytes for p in model.parameters())
    else:
        assert twice == pytest.approx(2 * once, rel=0.01)
    before = copy.deepcopy(model)
    made.learn(
        minibatches(low, batch_size=BATCH, epochs=1, seed=2), steps=steps_an_epoch(low, BATCH)
    )
    assert not same(model, before)


@pytest.mark.parametrize("method", ["fip", "distillation"])
def test_learning_without_remembered_inputs_is_an_error(method, tasks):
    made = make_learner(method, network(), settings(), augment=None, seed=0, freeze_batch_norm=True)
    with pytest.raises(RuntimeError, match="remember"):
        made.learn(minibatches(tasks[1], batch_size=8, epochs=1, seed=0), steps=1)


def test_labels_of_the_first_task_do_not_matter_to_the_path_and_distillation(tasks):
    low, _ = tasks
    for method in ("fip", "distillation"):
        found = []
        for labels in (low.train_labels[:20], low.train_labels[:20].flip(0)):
            model = network()
            made = make_learner(
                method, model, settings(), augment=None, seed=0, freeze_batch_norm=True
            )
            made.remember(low.train_inputs[:20], labels)
            made.learn(minibatches(tasks[1], batch_size=BATCH, epochs=1, seed=1), steps=10)
            found.append(model)
        assert same(*found)


def test_methods_need_no_optional_package_but_avalanche_and_timm():
    needs = {name: method.needs.distribution for name, method in METHODS.items() if method.needs}
    assert needs == dict.fromkeys(FROM_AVALANCHE, "avalanche-lib") | {"distillation-muon": "timm"}
    assert missing(METHODS) == {}


# Anchors with only some of their outputs held


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("method", ["fip", "distillation"])
def test_outputs_that_are_not_held_are_free(method, augmented, tasks):
    low, high = tasks
    model = network()
    made = make_learner(
        method,
        model,
        settings(),
        augment=many("digits", 2) if augmented else None,
        seed=0,
        freeze_batch_norm=True,
    )
    held = (
        made.remember(low.train_inputs[:30], low.train_labels[:30], (0, 5)) or made.known_anchors()
    )
    with torch.no_grad():
        model[-1].bias[5:] += 3.0
    assert held.drift() == 0
    inputs, reference = held.sample(0)
    assert torch.equal(held.model(*inputs)[:, 5:], torch.zeros(len(reference), 5))
    torch.testing.assert_close(held.model(*inputs)[:, :5], model(inputs[0])[:, :5])
    with torch.no_grad():
        model[-1].bias[:5] += 1.0
    assert held.drift() == pytest.approx(5.0, rel=1e-4)
    # Later anchors hold other outputs.
    made.remember(high.train_inputs[:30], high.train_labels[:30], (5, 10))
    with torch.no_grad():
        model[-1].bias[5:] += 1.0
    assert held.drift("none")[30:].tolist() == pytest.approx([5.0] * 30, rel=1e-4)
    before = copy.deepcopy(model)
    made.learn(
        minibatches(high, batch_size=BATCH, epochs=1, seed=2), steps=steps_an_epoch(high, BATCH)
    )
    assert not same(model, before)


def test_the_held_outputs_are_saved_with_the_learner(tasks):
    low, _ = tasks
    first, second = (
        make_learner("fip", network(), settings(), augment=None, seed=0, freeze_batch_norm=True)
        for _ in range(2)
    )
    first.remember(low.train_inputs[:10], low.train_labels[:10], (0, 5))
    first.remember(low.train_inputs[10:20], low.train_labels[10:20], (0, 10))
    second.load(first.state())
    for a, b in zip(
        first.known_anchors().sample(0).inputs, second.known_anchors().sample(0).inputs, strict=True
    ):
        assert torch.equal(a, b)
    assert torch.equal(first.known_anchors().reference, second.known_anchors().reference)


def test_gem_may_draw_from_its_memory(tasks):
    low, high = tasks
    model = network()
    drawing = dataclasses.replace(settings(), anchor_batch=30)
    made = make_learner("gem", model, drawing, augment=None, seed=0, freeze_batch_norm=True)
    for task in (low, high):
        made.remember(task.train_inputs[:60], task.train_labels[:60])
    seen = []
    hook = model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    steps = steps_an_epoch(low, BATCH)
    made.learn(minibatches(low, batch_size=BATCH, epochs=1, seed=2), steps=steps)
    hook.remove()
    # 30 remembered inputs of both tasks together, then the batch.
    assert seen == [15, 15, BATCH] * steps
    assert [len(x) for x in made.plugin.memory_x.values()] == [60, 60]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fip"])
@pytest.mark.parametrize("momentum", [None, 0.5])
def test_every_method_uses_the_momentum_it_was_given(method, momentum):
    """Without a given momentum, Adam's first beta cycles and Muon's momentum is 0.95."""
    task, model, seen = blobs(), digits_mlp(2), set()
    options = tuned(method, lr=1e-3, strength=1.0, momentum=momentum)
    learner = make_learner(
        method,
        model,
        settings(**{method: options}),
        augment=None,
        seed=0,
        freeze_batch_norm=False,
    )

    def watch(optimizer, args, kwargs):
        seen.update(group.get("momentum", group["betas"][0]) for group in optimizer.param_groups)

    learner.remember(task.train_inputs[:20], task.train_labels[:20])
    watching = register_optimizer_step_pre_hook(watch)
    learner.learn(minibatches(task, batch_size=20, epochs=4, seed=0), steps=40)
    watching.remove()
    if momentum is not None:
        assert seen == {momentum}
    elif method == "distillation-muon":
        assert seen == {0.95}
    else:
        assert (min(seen), max(seen)) == pytest.approx((0.85, 0.95), abs=1e-2)
