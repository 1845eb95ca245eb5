"""FIPOptimizer behind Accelerate: wrapped, saved and resumed, accumulating, in mixed precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from fipoptim import AnchorBatch, FIPOptimizer
from fipoptim.integrations import carry_anchors

OLD, X = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 3
LOADER = [(x, y) for x, y in zip(X.split(5), Y.split(5), strict=True)]


@pytest.fixture(autouse=True)
def _fresh_states():
    """Accelerate keeps its settings for the whole process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def prepared(model, seed=1, **options):
    """The Accelerator, and what it prepares."""
    accelerator = Accelerator(cpu=True, **options)  # first: anchors look for the other ranks
    generator = torch.Generator().manual_seed(seed)
    anchors = AnchorBatch(model, OLD, check=0.4, batch_size=5, generator=generator)
    optimizer = FIPOptimizer(model.parameters(), anchors, beta=5.0, eps=0.2, momentum=0.5)
    carry_anchors(optimizer)
    return accelerator, *accelerator.prepare(model, optimizer)


def train(accelerator, model, optimizer, batches):
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()  # before backward() it would drop what has accumulated


def test_the_wrapped_optimizer_takes_the_same_steps():
    model, plain = network(), network()
    accelerator, wrapped, optimizer = prepared(model)
    anchors = AnchorBatch(
        plain, OLD, check=0.4, batch_size=5, generator=torch.Generator().manual_seed(1)
    )
    own = FIPOptimizer(plain.parameters(), anchors, beta=5.0, eps=0.2, momentum=0.5)
    train(accelerator, wrapped, optimizer, LOADER)
    for x, y in LOADER:
        own.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        own.step()
    assert optimizer.optimizer.last_step == own.last_step is not None
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    model = network()
    whole = prepared(model)
    train(*whole, LOADER[:2])
    whole[0].save_state(str(tmp_path))
    train(*whole, LOADER[2:])
    trained = copy.deepcopy(model)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    resumed = prepared(trained, seed=7)  # the anchors take trained weights for the reference
    resumed[0].load_state(str(tmp_path))
    train(*resumed, LOADER[2:])
    for p, q in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(p, q)
    first = whole[2].optimizer.anchors
    assert torch.equal(resumed[2].optimizer.anchors.reference, first.reference)
    assert resumed[2].optimizer.anchors.drift() == first.drift() > 0


def test_accumulated_batches_are_one_step():
    model, at_once = network(), network()
    accelerator, wrapped, optimizer = prepared(model, gradient_accumulation_steps=2)
    start = [p.clone() for p in model.parameters()]
    train(accelerator, wrapped, optimizer, LOADER[:1])
    assert optimizer.optimizer.last_step is None
    assert all(torch.equal(p, q) for p, q in zip(start, model.parameters(), strict=True))
    train(accelerator, wrapped, optimizer, LOADER[1:2])
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    train(*prepared(at_once), [(X[:10], Y[:10])])
    for p, q in zip(model.parameters(), at_once.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_anchors_are_evaluated_in_full_precision_under_mixed_precision():
    model = network()
    accelerator, wrapped, optimizer = prepared(model, mixed_precision="bf16")
    anchors = optimizer.optimizer.anchors
    with torch.no_grad():
        assert not torch.equal(wrapped(anchors.inputs), anchors.reference)
    assert anchors.drift() == anchors.check.drift() == 0
    train(accelerator, wrapped, optimizer, LOADER)
    assert 0 < anchors.drift() < 10
