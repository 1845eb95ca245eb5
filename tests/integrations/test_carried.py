"""Anchors that travel in the optimizer's state."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fipoptim import AnchorBatch, FIPOptimizer
from fipoptim.integrations import carry_anchors

OLD, X = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))


class Run:
    """A network that is trained on X while it is held on OLD."""

    def __init__(self, model: nn.Module | None = None, seed: int = 1, width: int = 3) -> None:
        torch.manual_seed(0)
        self.model = model or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, width))
        generator = torch.Generator().manual_seed(seed)
        self.anchors = AnchorBatch(self.model, OLD, check=0.4, batch_size=5, generator=generator)
        self.optimizer = FIPOptimizer(
            self.model.parameters(), self.anchors, beta=5.0, eps=0.2, momentum=0.5
        )
        carry_anchors(self.optimizer)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(X), torch.arange(20) % 3).backward()
            self.optimizer.step()

    def saved(self) -> dict:
        """The optimizer's state, through a file."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)


def test_a_resumed_run_takes_the_first_reference_back():
    whole = Run()
    whole.steps(3)
    state, model = whole.saved(), copy.deepcopy(whole.model)
    whole.steps(3)
    resumed = Run(model, seed=7)  # the anchors take the trained network for the reference
    assert not torch.equal(resumed.anchors.reference, whole.anchors.reference)
    resumed.optimizer.load_state_dict(state)
    assert torch.equal(resumed.anchors.reference, whole.anchors.reference)
    assert torch.equal(resumed.anchors.check.reference, whole.anchors.check.reference)
    resumed.steps(3)
    for p, q in zip(whole.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_without_anchors_is_loaded_as_before():
    run = Run()
    run.steps(1)
    state = run.saved()
    del state["anchors"]
    run.optimizer.load_state_dict(state)
    other = Run(run.model)
    with pytest.raises(ValueError, match="other reference outputs"):
        other.optimizer.load_state_dict(state)


def broken(state: dict) -> dict:
    state["param_groups"][0]["lr"] = -1.0
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken, "lr: must be"),
        (lambda state: state | {"anchors": {}}, "state: lacks"),
        (lambda state: Run(width=2).saved(), "another model"),
    ],
)
def test_a_state_that_is_refused_changes_nothing(change, message):
    run = Run()
    run.steps(2)
    other = Run(run.model, seed=7)
    before, reference = copy.deepcopy(other.optimizer.state_dict()), other.anchors.reference.clone()
    with pytest.raises(ValueError, match=message):
        other.optimizer.load_state_dict(change(run.saved()))
    assert torch.equal(other.anchors.reference, reference)
    torch.testing.assert_close(other.optimizer.state_dict(), before)


def test_anchors_are_carried_once_and_not_by_copies():
    run = Run()
    reference = run.anchors.reference.clone()
    carry_anchors(run.optimizer)
    assert len(run.optimizer._optimizer_state_dict_post_hooks) == 1
    assert torch.equal(run.optimizer.state_dict()["anchors"]["reference"], reference)
    assert "anchors" not in copy.deepcopy(run.optimizer).state_dict()


def test_other_optimizers_are_refused():
    with pytest.raises(TypeError, match="must be a FIPOptimizer, got Adam"):
        carry_anchors(torch.optim.Adam(nn.Linear(1, 1).parameters()))
    with pytest.raises(TypeError, match="got NoneType"):
        carry_anchors(None)
