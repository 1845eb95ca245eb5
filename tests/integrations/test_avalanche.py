"""FIPPlugin in a strategy of Avalanche, with a head that grows."""

from functools import partial

import pytest
import torch
from avalanche.benchmarks.scenarios.supervised import class_incremental_benchmark
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.logging import BaseLogger
from avalanche.models import IncrementalClassifier, MultiHeadClassifier
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import TensorDataset

from fipoptim import FIPOptimizer
from fipoptim.integrations.avalanche import FIPPlugin

CLASSES, BUDGET = 6, 0.1


def data(seed):
    """Six classes of 20 points each, around means that are apart."""
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(CLASSES).repeat(20)
    points = TensorDataset(means[labels] + torch.randn(120, 8, generator=generator), labels)
    points.targets = labels.tolist()  # read by Avalanche
    return points


BENCHMARK = class_incremental_benchmark(
    {"train": data(0), "test": data(1)}, num_experiences=3, seed=2
)


class Network(nn.Module):
    """A body, and a head that grows by the classes of each experience."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.head = IncrementalClassifier(16, 2)

    def forward(self, x):
        return self.head(self.body(x))


def strategy(model=None, **options):
    torch.manual_seed(0)
    model = model or Network()
    made = partial(FIPOptimizer, beta=10.0, eps=0.5, max_flips=BUDGET, check_every=None)
    options = {"optimizer": made, "classes": CLASSES} | options
    plugin = FIPPlugin(
        16,
        check=0.4,
        schedule=lambda optimizer, steps: LinearLR(optimizer, 1.0, 0.1, steps),
        generator=torch.Generator().manual_seed(1),
        batch_size=8,
        **options,
    )
    return SupervisedTemplate(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), 1e-2),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=10,
        train_epochs=2,
        eval_mb_size=50,
        plugins=[plugin],
        evaluator=EvaluationPlugin(loggers=[BaseLogger()]),
    )


def train(strategy, experiences):
    for experience in experiences:
        torch.manual_seed(10 + experience.current_experience)
        strategy.train(experience, num_workers=0)


def test_known_outputs_are_held_within_the_budget_while_the_head_grows():
    learner = strategy()
    plugin, network = learner.plugins[0], learner.model
    widths, seen = [], set()
    for number, experience in enumerate(BENCHMARK.train_stream, start=1):
        before = [p.clone() for p in network.body.parameters()]
        reference = None if plugin.anchors is None else plugin.anchors.check.reference.clone()
        train(learner, [experience])
        assert not any(
            torch.equal(p, q) for p, q in zip(before, network.body.parameters(), strict=True)
        )
        seen |= set(experience.classes_in_this_experience)
        assert plugin.known == seen
        assert len(plugin.anchors) + len(plugin.anchors.check) == 16 * number
        widths.append(network.head.classifier.out_features)
        if reference is None:
            assert isinstance(learner.optimizer, torch.optim.Adam)
            continue
        assert isinstance(learner.optimizer, FIPOptimizer)
        assert learner.optimizer.anchors is plugin.anchors
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)  # scheduled
        assert {id(p) for p in learner.optimizer.param_groups[0]["params"]} == {
            id(p) for p in network.parameters()
        }
        # The inputs of earlier experiences kept their reference, and predictions among the classes known then.
        check = plugin.anchors.check
        assert torch.equal(check.reference[: len(reference)], reference)
        old = check.outputs(check.inputs)[: len(reference)]
        flips = (old.argmax(1) != reference.argmax(1)).double().mean()
        assert flips <= BUDGET
        metrics = learner.evaluator.get_last_metrics()
        assert metrics["FIP/max_flips"] == BUDGET
        assert metrics["FIP/drift"] > 0
        assert metrics["FIP/settle_seconds"] > 0
    assert widths[-1] == CLASSES > widths[0]


def test_an_evaluation_on_the_way_is_of_a_settled_network():
    learner = strategy()
    plugin, found = learner.plugins[0], []
    train(learner, BENCHMARK.train_stream[:1])

    class Looks(BaseLogger):
        def before_eval(self, strategy, metrics, **kwargs):
            found.append(plugin.anchors.check.measure().flips)

    learner.evaluator.loggers.append(Looks())
    learner.plugins[-2].eval_every = 1  # the plugin that evaluates after each epoch
    train(learner, BENCHMARK.train_stream[1:2])
    assert len(found) >= 2
    assert max(found) <= BUDGET


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path, capsys):
    whole = strategy()
    train(whole, BENCHMARK.train_stream[:2])
    save_checkpoint(whole, tmp_path / "strategy.pt")
    resumed, experience = maybe_load_checkpoint(strategy(), tmp_path / "strategy.pt")
    assert experience == 2
    for learner in (whole, resumed):
        train(learner, BENCHMARK.train_stream[2:])
    assert whole.model is not resumed.model
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(whole.plugins[0].anchors.reference, resumed.plugins[0].anchors.reference)


def test_a_network_that_was_trained_elsewhere_is_held_from_the_start():
    learner = strategy()
    network, plugin = learner.model, learner.plugins[0]
    learnt = BENCHMARK.train_stream[0].dataset
    network.head.active_units[:] = 1
    plugin.hold(network, torch.stack([x for x, *_ in learnt]), [0, 1])
    train(learner, BENCHMARK.train_stream[1:2])
    assert isinstance(learner.optimizer, FIPOptimizer)
    assert plugin.known == {0, 1} | set(BENCHMARK.train_stream[1].classes_in_this_experience)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="per_experience"):
        FIPPlugin(0, FIPOptimizer, classes=2)
    with pytest.raises(TypeError, match="optimizer"):
        FIPPlugin(5, "adam", classes=2)
    plugin = FIPPlugin(5, FIPOptimizer, classes=2)
    with pytest.raises(ValueError, match="classes: 2 may come, got class 3"):
        plugin.hold(nn.Linear(2, 4), torch.randn(5, 2), [0, 3])
    with pytest.raises(TypeError, match="MultiHeadClassifier takes task labels"):
        plugin.hold(MultiHeadClassifier(2), torch.randn(5, 2), [0])
    assert plugin.anchors is None
    learner = strategy(optimizer=lambda params, anchors: torch.optim.Adam(params))
    train(learner, BENCHMARK.train_stream[:1])
    before = [p.clone() for p in learner.model.body.parameters()]
    with pytest.raises(TypeError, match="must make a FIPOptimizer, got Adam"):
        train(learner, BENCHMARK.train_stream[1:2])
    assert all(
        torch.equal(p, q) for p, q in zip(before, learner.model.body.parameters(), strict=True)
    )
