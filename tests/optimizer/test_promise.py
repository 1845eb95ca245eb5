"""The promises of max_drift and max_flips: at every step, at checks, and after settle()."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipoptim import AnchorBatch, FIPOptimizer, Solver


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3))


def inputs(count: int, seed: int) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def walk(model: nn.Module, optimizer: FIPOptimizer, steps: int, seed: int = 0) -> None:
    """Steps toward a task that changes every output."""
    for k in range(steps):
        optimizer.zero_grad()
        x = inputs(16, 100 * seed + k) + 1.0
        nn.functional.cross_entropy(model(x), torch.zeros(16, dtype=torch.long)).backward()
        optimizer.step()


def distance(model: nn.Module, old: nn.Module, x: Tensor) -> tuple[float, float]:
    """Drift and flips by plain calls of both networks."""
    with torch.no_grad():
        now, then = model(x), old(x)
        drift = float((now - then).square().sum(dim=1).mean())
        return drift, float((now.argmax(1) != then.argmax(1)).sum()) / len(x)


# One step, a few, none: the kinds of promise.
EVERY = [1, 4, None]
BUDGETS = [{"max_drift": 0.02}, {"max_flips": 0.1}, {"max_drift": 0.1, "max_flips": 0.05}]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("check_every", EVERY)
@pytest.mark.parametrize("products", [0, 2])
@pytest.mark.parametrize("precondition", [None, "adam"])
def test_the_budget_holds_on_the_check_inputs(
    budget: dict[str, float], check_every: int | None, products: int, precondition: str | None
) -> None:
    model = network()
    old = copy.deepcopy(model)
    check = inputs(40, 1)
    anchors = AnchorBatch(model, inputs(30, 0), check=check, batch_size=10)
    optimizer = FIPOptimizer(
        model.parameters(), anchors, eps=0.2, check_every=check_every, precondition=precondition,
        solver=Solver(products=products), **budget,
    )  # fmt: skip

    def within() -> bool:
        drift, flips = distance(model, old, check)
        # Both evaluations are the same up to rounding; flips are whole inputs.
        return (
            drift <= budget.get("max_drift", math.inf) * (1 + 1e-5)
            and flips <= budget.get("max_flips", 1.0) + 1e-12
        )

    left = False
    for k in range(1, 13):
        walk(model, optimizer, 1, seed=k)
        left = left or not within()
        info = optimizer.last_step
        assert info is not None
        if check_every and k % check_every == 0:
            assert within()
            found = anchors.check.measure()  # type: ignore[union-attr]
            assert (info.drift, info.flips) == (found.drift, found.flips)
        else:
            assert info.flips is None
    assert left == (
        check_every != 1
    )  # between checks nothing is promised, and the case is no trivial one
    restored = optimizer.settle()
    assert restored.within
    assert within()
    assert optimizer.settle().products == 0  # a network that is within is left alone


def test_a_step_at_the_edge_takes_forward_passes_and_no_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network()
    anchors = AnchorBatch(model, inputs(30, 0))
    optimizer = FIPOptimizer(
        model.parameters(), anchors, eps=0.2, max_drift=0.02, solver=Solver(products=0)
    )
    passes: list[int] = []
    evaluate = AnchorBatch.outputs

    def counted(self: AnchorBatch, *args: Any, **options: Any) -> Tensor:
        passes.append(1)
        return evaluate(self, *args, **options)

    monkeypatch.setattr(AnchorBatch, "outputs", counted)
    walk(model, optimizer, 3)
    shortened = usual = 0
    for k in range(20):
        passes.clear()
        walk(model, optimizer, 1, seed=5 + k)
        info = optimizer.last_step
        assert info is not None
        assert info.iterations == 0
        # The whole step, the restoring direction, and a confirmation. Sometimes one more.
        assert len(passes) <= 4
        usual += len(passes) <= 3
        shortened += info.backtracks > 0
    assert shortened > 10
    assert usual > 10


def test_a_budget_at_every_step_still_learns() -> None:
    """The path goes along the edge of the budget, not back and forth at its start."""
    model = network()
    anchors = AnchorBatch(model, inputs(30, 0))
    optimizer = FIPOptimizer(
        model.parameters(), anchors, eps=0.1, max_drift=0.05, solver=Solver(products=0)
    )
    x = inputs(200, 9) + 1.0

    def loss() -> float:
        zeros = torch.zeros(200, dtype=torch.long)
        return float(nn.functional.cross_entropy(model(x), zeros).detach())

    before = loss()
    walk(model, optimizer, 20)
    middle = loss()
    walk(model, optimizer, 60, seed=1)
    assert loss() < middle - 0.02 < before - 0.04
    assert anchors.drift() > 0.5 * 0.05


class Hostile(nn.Module):
    """A loss whose gradient is wild: of any size, and now and then not finite."""

    def __init__(self, log_scale: float, broken: float, seed: int) -> None:
        super().__init__()
        self.scale, self.broken = 10.0**log_scale, broken
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, z: Tensor) -> Tensor:
        noise = torch.randn(z.shape, generator=self.generator)
        loss = self.scale * (z * noise).sum() + (z.square() * noise.abs()).sum()
        if float(torch.rand((), generator=self.generator)) < self.broken:
            loss = loss * math.nan
        return loss


@settings(max_examples=15, deadline=None)
@given(
    budget=st.sampled_from(
        [*BUDGETS, {"max_drift": 0.0}, {"max_flips": 0.0}, {"max_drift": 1e-6}, {"max_drift": 1e3}]
    ),
    check_every=st.sampled_from([1, 2, 5, None]),
    check=st.sampled_from([None, 0.5]),
    products=st.sampled_from([0, 2, "adaptive"]),
    precondition=st.sampled_from([None, "adam", "muon"]),
    momentum=st.sampled_from([0.0, 0.9]),
    beta=st.sampled_from([0.0, 1.0, 1e4, "auto"]),
    eps=st.sampled_from([1e-3, 0.3, 30.0]),
    log_scale=st.integers(-8, 8),
    broken=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 1000),
)
def test_no_promise_is_broken_by_hostile_losses(
    budget: dict[str, float],
    check_every: int | None,
    check: float | None,
    products: int | str,
    precondition: str | None,
    momentum: float,
    beta: float | str,
    eps: float,
    log_scale: int,
    broken: float,
    seed: int,
) -> None:
    model = network(seed)
    anchors = AnchorBatch(model, inputs(20, seed), check=check)
    optimizer = FIPOptimizer(
        model.parameters(), anchors, beta=beta, eps=eps, momentum=momentum,
        check_every=check_every, precondition=precondition, solver=Solver(products=products),
        **budget,
    )  # fmt: skip
    loss = Hostile(log_scale, broken, seed)
    taken = 0
    for k in range(8):
        optimizer.zero_grad()
        loss(model(inputs(6, 1000 + k))).backward()
        before = [p.detach().clone() for p in model.parameters()]
        try:
            optimizer.step()
            taken += 1
        except RuntimeError:
            # A step that is refused leaves every weight as it was, and so the promise of before.
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        if check_every is not None and taken and taken % check_every == 0:
            assert optimizer.budget.holds(anchors.counted.measure())
    optimizer.settle()
    assert optimizer.budget.holds(anchors.counted.measure())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_an_interrupted_run_can_be_settled() -> None:
    model = network()
    old = copy.deepcopy(model)
    anchors = AnchorBatch(model, inputs(30, 0), check=inputs(40, 1))
    options: dict[str, Any] = {"eps": 0.2, "max_drift": 0.0, "check_every": None}
    optimizer = FIPOptimizer(model.parameters(), anchors, **options)
    walk(model, optimizer, 5)
    file = io.BytesIO()
    torch.save([model.state_dict(), anchors.state_dict(), optimizer.state_dict()], file)
    file.seek(0)

    weights, held, state = torch.load(file, weights_only=True)
    resumed = network(1)
    resumed.load_state_dict(weights)
    anchors = AnchorBatch(resumed, inputs(30, 0), check=inputs(40, 1))
    anchors.load_state_dict(held)
    optimizer = FIPOptimizer(resumed.parameters(), anchors, **options)
    optimizer.load_state_dict(state)
    restored = optimizer.settle()
    # A budget of zero leaves the start alone, bit for bit.
    assert restored.went_back == 1.0
    assert all(
        torch.equal(p, q) for p, q in zip(resumed.parameters(), old.parameters(), strict=True)
    )


def test_settle_says_what_it_took() -> None:
    model = network()
    anchors = AnchorBatch(model, inputs(30, 0), check=inputs(40, 1))
    optimizer = FIPOptimizer(model.parameters(), anchors, eps=0.2, max_drift=0.05, check_every=None)
    walk(model, optimizer, 10)
    start = [p.detach().clone() for p in model.parameters()]
    before = anchors.check.measure()  # type: ignore[union-attr]
    restored = optimizer.settle()
    assert restored.before == before
    assert restored.after == anchors.check.measure()  # type: ignore[union-attr]
    # The network ends at the budget rather than far below it.
    assert 0.5 * 0.05 < restored.after.drift <= 0.05
    moved = [p - q for p, q in zip(model.parameters(), start, strict=True)]
    length = math.sqrt(sum(float(m.detach().square().sum()) for m in moved))
    assert restored.length == pytest.approx(length, rel=1e-4)
    assert "within the budget" in str(restored)


def test_a_network_that_something_else_moved_is_settled_or_refused() -> None:
    model = network()
    anchors = AnchorBatch(model, inputs(30, 0))
    optimizer = FIPOptimizer(model.parameters(), anchors, eps=0.05, max_drift=0.05)
    walk(model, optimizer, 2)
    with torch.no_grad():
        model[0].weight.add_(0.5)
    assert anchors.drift() > 0.05
    walk(model, optimizer, 1, seed=3)
    assert anchors.drift() <= 0.05


def test_settle_puts_the_weights_back_if_the_budget_cannot_be_reached() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.register_buffer("shift", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.net(x)) + self.shift

    model = Shifted()
    anchors = AnchorBatch(model, inputs(30, 0))
    optimizer = FIPOptimizer(
        model.parameters(), anchors, eps=0.05, max_drift=0.01, check_every=None
    )
    walk(model, optimizer, 2)
    model.shift += 100.0  # no weight can undo this
    start = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"^max_drift: the drift is .*The weights are as they were"
    ):
        optimizer.settle()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))


def test_pruned_weights_stay_zero_in_settle() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[:, 0] = 0.0
    anchors = AnchorBatch(model, inputs(30, 0))
    optimizer = FIPOptimizer(
        model.parameters(), anchors, eps=0.2, max_drift=0.01, check_every=None, keep_zeros=True
    )
    walk(model, optimizer, 5)
    assert optimizer.settle().steps + optimizer.settle().went_back >= 0
    assert not bool(model[0].weight[:, 0].any())
    assert anchors.drift() <= 0.01


def test_a_start_beyond_the_budget_is_refused_before_anything_moves() -> None:
    model, old = network(0), network(1)
    anchors = AnchorBatch(model, inputs(30, 0), reference=old)
    optimizer = FIPOptimizer(model.parameters(), anchors, max_drift=1e-4, check_every=5)
    start = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"^max_drift: the drift is .* before the first step"):
        walk(model, optimizer, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_flips": 1.0}, ValueError, r"^max_flips: must be in \[0, 1\), got 1.0"),
        ({"max_flips": -0.1}, ValueError, r"^max_flips: must be in \[0, 1\), got -0.1"),
        ({"max_flips": "few"}, TypeError, r"^max_flips: must be a number, got 'few'"),
        ({"beta": "auto"}, ValueError, r"^beta: 'auto' needs a budget"),
        ({"beta": "car", "max_drift": 1.0}, TypeError, r"^beta: must be a number, got 'car'"),
        (
            {"check_every": 0, "max_drift": 1.0},
            ValueError,
            r"^check_every: must be a positive integer",
        ),
        ({"check_every": 2.5, "max_drift": 1.0}, ValueError, r"^check_every: must be a positive"),
    ],
)
def test_bad_budgets_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = network()
    with pytest.raises(error, match=message):
        FIPOptimizer(model.parameters(), AnchorBatch(model, inputs(5, 0)), **options)


def test_settle_without_a_budget_is_refused() -> None:
    model = network()
    optimizer = FIPOptimizer(model.parameters(), AnchorBatch(model, inputs(5, 0)))
    with pytest.raises(ValueError, match="^settle: there is no budget"):
        optimizer.settle()


def test_a_settlement_without_products_goes_back_on_the_line() -> None:
    model = network()
    start = copy.deepcopy(model)
    anchors = AnchorBatch(model, inputs(30, 0), check=inputs(40, 1))
    optimizer = FIPOptimizer(
        model.parameters(), anchors, eps=0.2, max_drift=0.02, check_every=None, beta=100.0
    )
    walk(model, optimizer, 12)
    end = copy.deepcopy(model)
    assert anchors.check.drift() > 0.02
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="max_products: must be an integer >= 0"):
            optimizer.settle(max_products=wrong)
    found = optimizer.settle(max_products=0)
    assert (found.products, found.steps) == (0, 0)
    assert found.within
    assert 0 < found.went_back < 1
    assert anchors.check.drift() == found.after.drift <= 0.02
    for p, a, b in zip(model.parameters(), end.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, torch.lerp(a, b, found.went_back))
