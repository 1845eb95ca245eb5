"""Promises that hold for every run, as properties of random networks, anchors, settings and closures."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipoptim import AnchorBatch, FIPOptimizer, Solver

MODES = ("closure", "grad", "secondary", "none")


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """A network, its anchors, the optimizer's settings and how its gradient comes."""
    return {
        "widths": draw(st.lists(st.integers(1, 8), min_size=2, max_size=4)),
        "activation": draw(st.sampled_from([nn.Tanh, nn.ReLU, nn.Softplus])),
        "anchors": draw(st.integers(1, 12)),
        "seed": draw(st.integers(0, 1000)),
        "output": draw(st.sampled_from(["logits", "probabilities", torch.sin])),
        "mode": draw(st.sampled_from(MODES)),
        "share": draw(st.sampled_from([None, 0.5])),
        "options": {
            "beta": 10.0 ** draw(st.floats(-4, 3)),
            "eps": 10.0 ** draw(st.floats(-4, 0)),
            "momentum": draw(st.sampled_from([0.0, 0.9])),
            "drift_correction": draw(st.booleans()),
            "precondition": draw(st.sampled_from([None, "adam", "muon"])),
            "solver": draw(
                st.sampled_from([None, Solver(products=0), Solver(products=3), Solver(radius=0.01)])
            ),
        },
    }


class Run:
    """A model and an optimizer in the middle of a run; a run is copied and pickled as a whole."""

    def __init__(
        self, run: dict[str, Any], dtype: torch.dtype = torch.float64, **options: Any
    ) -> None:
        torch.manual_seed(run["seed"])
        widths = run["widths"]
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(a, b), run["activation"]()]
        self.model = nn.Sequential(*layers[:-1]).to(dtype)
        self.x = torch.randn(6, widths[0], dtype=dtype)
        self.y = torch.randn(6, widths[-1], dtype=dtype)
        batch = None if run["share"] is None else max(1, int(run["share"] * run["anchors"]))
        anchors = torch.randn(run["anchors"], widths[0], dtype=dtype)
        self.anchors = AnchorBatch(self.model, anchors, output=run["output"], batch_size=batch)
        self.mode = run["mode"]
        self.optimize(**(run["options"] | options))

    def optimize(self, **options: Any) -> None:
        """Begin with a new optimizer; it uses the traces of the anchors that exist already."""
        secondary = self.loss if self.mode == "secondary" else None
        self.opt = FIPOptimizer(self.model.parameters(), self.anchors, secondary, **options)

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.y)

    def closure(self) -> Tensor:
        self.opt.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def step(self) -> None:
        if self.mode == "closure":
            self.opt.step(self.closure)
        else:
            self.opt.zero_grad()
            if self.mode == "grad":
                self.loss().backward()
            self.opt.step()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).clone()


def same(a: Run, b: Run) -> bool:
    return torch.equal(a.weights(), b.weights()) and a.opt.last_step == b.opt.last_step


@settings(max_examples=15, deadline=None)
@given(
    run=runs(), log_budget=st.floats(-8, 0), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_max_drift_holds_after_every_step(
    run: dict[str, Any], log_budget: float, dtype: torch.dtype
) -> None:
    budget = 10.0**log_budget
    it = Run(run, dtype, max_drift=budget)
    for _ in range(6):
        it.step()
        assert it.anchors.drift() <= budget
        assert it.opt.last_step is not None
        assert it.opt.last_step.drift == it.anchors.drift()
        assert bool(torch.isfinite(it.weights()).all())


@settings(max_examples=12, deadline=None)
@given(run=runs(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_every_step_has_the_length_asked_for(run: dict[str, Any], dtype: torch.dtype) -> None:
    run["options"]["precondition"] = None
    if run["options"]["solver"] is not None and run["options"]["solver"].radius:
        run["options"]["solver"] = None  # a radius may shorten the step
    it = Run(run, dtype)
    eps = run["options"]["eps"]
    for _ in range(3):
        before = it.weights().double()
        it.step()
        size = float(before.norm())
        rounding = torch.finfo(dtype).eps * max(size, 1.0) * math.sqrt(len(before))
        length = float((it.weights().double() - before).norm())
        if length == 0.0:
            # A minimum of the secondary objective (a dead ReLU network has no gradient).
            assert it.mode != "none"
            assert all(p.grad is None or not p.grad.any() for p in it.model.parameters())
            return
        if float(torch.as_tensor(it.opt.last_step.multiplier)) == 0.0:
            assert length <= eps * (1 + 1e-4) + rounding
        else:
            assert length == pytest.approx(eps, rel=1e-5, abs=rounding)
        assert it.opt.last_step.step_norm == pytest.approx(length, rel=1e-4, abs=rounding)


@settings(max_examples=12, deadline=None)
@given(run=runs())
def test_the_predicted_change_is_right_to_second_order(run: dict[str, Any]) -> None:
    # Smooth networks, and the change of the outputs as a vector by the length of its difference:
    # |measured - predicted| <= C eps^2, so that half the length leaves about a quarter.
    run["activation"], run["options"]["drift_correction"] = nn.Tanh, False
    run["share"] = None
    gaps, lengths = [], [4e-3, 2e-3, 1e-3]
    it = Run(run, precondition=None, solver=Solver(products=200, tol=1e-13))
    start = copy.deepcopy(it.model.state_dict())
    for length in lengths:
        it.model.load_state_dict(start)
        it.optimize(
            **run["options"]
            | {"eps": length, "beta": length, "precondition": None}
            | {"solver": Solver(products=200, tol=1e-13)}
        )
        jac = torch.func.jacrev(
            lambda q, it=it: it.anchors.call(
                it.anchors.inputs, it.anchors.weights()._replace(parameters=q)
            )
        )({k: p.detach() for k, p in it.model.named_parameters()})
        j = torch.cat([block.flatten(2) for block in jac.values()], dim=2)
        before, z = it.weights(), it.anchors.outputs(it.anchors.inputs)
        it.step()
        v = it.weights() - before
        dz = it.anchors.outputs(it.anchors.inputs) - z
        gaps.append(float((dz - j @ v).norm()))
        info = it.opt.last_step
        assert info is not None
        assert info.output_change == pytest.approx(
            float(dz.norm()) / math.sqrt(len(dz)), rel=1e-6, abs=1e-12
        )
        predicted = float((j @ v).norm()) / math.sqrt(len(dz))
        assert info.output_change_predicted == pytest.approx(predicted, rel=1e-3, abs=1e-8)
    if gaps[0] > 1e-9:
        # beta / eps is kept, so the three steps point the same way to first order.
        assert gaps[1] <= gaps[0] / 4 * 1.3 + 1e-10
        assert gaps[2] <= gaps[1] / 4 * 1.3 + 1e-10


@settings(max_examples=8, deadline=None)
@given(run=runs())
def test_the_same_seed_gives_the_same_path_bit_for_bit(run: dict[str, Any]) -> None:
    a, b = Run(run), Run(run)
    for _ in range(3):
        a.step()
        torch.randn(3)  # other random draws do not change the path
        b.step()
        assert same(a, b)


@settings(max_examples=8, deadline=None)
@given(run=runs(), how=st.sampled_from(["deepcopy", "pickle", "state_dict"]))
def test_a_copy_in_the_middle_of_a_run_goes_on_along_the_same_path(
    run: dict[str, Any], how: str
) -> None:
    a = Run(run)
    a.step()
    a.step()
    if how == "deepcopy":
        b = copy.deepcopy(a)
    elif how == "pickle":
        b = pickle.loads(pickle.dumps(a))
    else:
        file = io.BytesIO()
        parts = {"model": a.model, "opt": a.opt, "anchors": a.anchors}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        torch.manual_seed(12345)
        b = Run(run | {"seed": 999})
        b.x, b.y = a.x, a.y
        b.model.load_state_dict(saved["model"])
        b.anchors.load_state_dict(saved["anchors"])
        b.opt.load_state_dict(saved["opt"])
    for _ in range(3):
        a.step()
        b.step()
        assert same(a, b)


def test_a_run_at_its_drift_budget_still_makes_progress() -> None:
    # A long run at its budget still makes progress: the drift is corrected each time, and the run continues.
    run = {
        "widths": [4, 16, 2], "activation": nn.Tanh, "anchors": 5, "seed": 0, "output": "logits",
        "mode": "closure", "share": None,
        "options": {"beta": 10.0, "eps": 0.1, "solver": Solver(products=2)},
    }  # fmt: skip
    it = Run(run, max_drift=1e-4)
    before = float(it.loss())
    for _ in range(60):
        it.step()
        assert it.anchors.drift() <= 1e-4
    assert float(it.loss()) < 0.7 * before


def test_a_budget_that_cannot_be_held_raises_and_leaves_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    anchors = AnchorBatch(model, torch.randn(8, 3))
    opt = FIPOptimizer(list(model[3].parameters())[1:], anchors, eps=1e-3, max_drift=1e-9)
    with torch.no_grad():
        model[1].running_mean.add_(5.0)  # batch norm in train mode does this
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"max_drift: the drift is .* batch norm"):
        opt.step()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_a_drift_left_by_others_is_restored_by_the_next_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    anchors = AnchorBatch(model, torch.randn(6, 3, dtype=torch.float64))
    opt = FIPOptimizer(model.parameters(), anchors, eps=0.1, max_drift=1e-6)
    opt.step()
    with torch.no_grad():
        model[2].bias.add_(0.05)
    assert anchors.drift() > 1e-3
    opt.step()
    assert anchors.drift() <= 1e-6
