"""Saving, loading, copying and pickling a FIPOptimizer in the middle of a run."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from drop_in_task import Task, flat, same
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fipoptim import FIPOptimizer, Solver
from fipoptim.secondary import TaskLoss

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.9},
    "adam": {"precondition": "adam", "momentum": 0.5},
    "muon": {"precondition": "muon", "momentum": 0.5},
    "exact": {"solver": Solver(products=6), "drift_correction": False},
    "max_drift": {"max_drift": 0.01},
    "groups": {"groups": True, "momentum": 0.9},
    "anchors drawn": {"batch_size": 2},
    "secondary": {"secondary": True, "momentum": 0.9},
    "mixed dtypes": {"mixed": True, "momentum": 0.9, "precondition": "adam"},
    "free path": {"free": True},
    "muon, mixed dtypes": {"mixed": True, "momentum": 0.9, "precondition": "muon"},
    "muon in groups": {"groups": True, "momentum": 0.9, "precondition": "muon"},
    "free path in groups": {"free": True, "groups": True, "precondition": "adam"},
}


class Run:
    """A run in one of `CONFIGURATIONS`: on the task's loss, or with `free` on L = 0."""

    def __init__(
        self,
        groups: bool = False,
        free: bool = False,
        secondary: bool = False,
        mixed: bool = False,
        batch_size: int | None = None,
        seed: int = 3,
        **options: Any,
    ) -> None:
        self.task = Task()
        self.model: nn.Module = self.task.model
        self.without_closure = free or secondary
        if mixed:
            self.model.body.register_forward_pre_hook(to_float)
            self.model.head.register_forward_pre_hook(to_double)
            self.model.body.float()
        params: Any = self.model.parameters()
        if groups:
            params = [{"params": self.model.body.parameters(), "lr": 0.02}]
            params.append({"params": self.model.head.parameters(), "momentum": 0.2})
        draws, directions = (torch.Generator().manual_seed(seed + i) for i in range(2))
        self.optimizer = FIPOptimizer(
            params,
            self.task.anchors(batch_size=batch_size, generator=draws),
            TaskLoss(self.model, [(self.task.x, self.task.y)]) if secondary else None,
            eps=0.05,
            generator=directions,
            **options,
        )

    def advance(self, count: int, model: Any = None, optimizer: Any = None) -> None:
        model, optimizer = model or self.model, optimizer or self.optimizer
        for _ in range(count):
            if self.without_closure:
                optimizer.step()
            else:
                optimizer.step(self.task.closure(optimizer, model))


def to_float(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].float(),)


def to_double(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].double(),)


configurations = pytest.mark.parametrize(
    "options", [pytest.param(c, id=name) for name, c in CONFIGURATIONS.items()]
)


@configurations
@pytest.mark.parametrize("steps", [0, 3])
def test_saved_run_goes_on_along_the_same_path(options, steps):
    run = Run(**options)
    run.advance(steps)
    file = io.BytesIO()
    parts = {"model": run.model, "optimizer": run.optimizer, "anchors": run.optimizer.anchors}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    run.advance(3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Run(seed=17, **options)  # the seeds differ, so the loaded states must bring their own
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.anchors.load_state_dict(saved["anchors"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.advance(3)
    assert same(run.model, resumed.model)
    assert run.optimizer.last_step == resumed.optimizer.last_step


@configurations
def test_loading_brings_back_an_earlier_moment(options):
    run = Run(**options)
    run.advance(2)
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    run.advance(2)
    first = flat(run.model)
    run.model.load_state_dict(saved[0])
    run.optimizer.load_state_dict(saved[1])
    run.advance(2)
    assert torch.equal(flat(run.model), first)


@configurations
@pytest.mark.parametrize("steps", [0, 3])
def test_a_deepcopy_in_the_middle_of_a_run_continues_along_the_same_path(options, steps):
    run = Run(**options)
    run.advance(steps)
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    alone = copy.deepcopy(run.optimizer)
    start = flat(run.model)
    assert optimizer.anchors.model is model
    assert alone.anchors.model is not run.model
    for copied_model, copied_optimizer in ((model, optimizer), (alone.anchors.model, alone)):
        mine = {id(p) for p in copied_model.parameters()}
        assert all(id(p) in mine for g in copied_optimizer.param_groups for p in g["params"])
        assert all(id(p) in mine for p in copied_optimizer.state)
        run.advance(3, copied_model, copied_optimizer)
        assert torch.equal(flat(run.model), start)
    run.advance(3)
    assert same(run.model, model)
    assert same(run.model, alone.anchors.model)
    assert run.optimizer.last_step == optimizer.last_step


def test_a_copy_whose_secondary_uses_the_original_model_raises():
    """A lambda is not copied with what it closes over: it is the loss of the original's model."""
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors(), lambda: task.loss())
    optimizer.step()
    model, other = copy.deepcopy((task.model, optimizer))
    start = flat(model)
    with pytest.raises(RuntimeError, match="secondary"):
        other.step()
    assert torch.equal(flat(model), start)


@configurations
@pytest.mark.parametrize("steps", [0, 3])
def test_a_pickle_in_the_middle_of_a_run_continues_along_the_same_path(options, steps):
    run = Run(**options)
    run.advance(steps)
    optimizer = pickle.loads(pickle.dumps(run.optimizer))
    model = optimizer.anchors.model
    assert type(optimizer) is FIPOptimizer
    assert {**optimizer.defaults, "differentiable": 0} == {
        **run.optimizer.defaults,
        "differentiable": 0,  # torch's own __setstate__ adds this one
    }
    assert optimizer.last_step == run.optimizer.last_step
    run.advance(3, model, optimizer)
    run.advance(3)
    assert same(run.model, model)


def test_pickled_optimizer_takes_groups_with_its_defaults():
    task = Task()
    optimizer = FIPOptimizer(task.model.body.parameters(), task.anchors(), eps=0.3, beta=2.0)
    optimizer = pickle.loads(pickle.dumps(optimizer))
    optimizer.add_param_group({"params": optimizer.anchors.model.head.parameters()})
    assert optimizer.param_groups[1]["lr"] == 0.3
    assert optimizer.param_groups[1]["beta"] == 2.0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_free_of_schedulers_and_hooks(duplicate):
    """A scheduler puts a bound `step` on the instance; in a copy it would step the original."""
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors(), eps=0.05)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda *args: calls.append(args))
    optimizer.step(task.closure(optimizer))
    scheduler.step()
    other = duplicate(optimizer)
    model = other.anchors.model
    before, other_before = flat(task.model), flat(model)
    other.step(task.closure(other, model))
    assert torch.equal(flat(task.model), before)
    assert float(flat(model).dist(other_before)) == pytest.approx(0.025, rel=1e-6)
    assert len(calls) == 1
    again = lr_scheduler.ExponentialLR(other, 0.5)  # this starts from the initial lr
    other.step(task.closure(other, model))
    again.step()
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert torch.equal(flat(task.model), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_can_be_taken_while_recording(duplicate):
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors())
    with optimizer.record() as path:
        optimizer.step(task.closure(optimizer))
        other = duplicate(optimizer)
        other.step(task.closure(other, other.anchors.model))
        optimizer.step(task.closure(optimizer))
    assert len(path) == 3


@configurations
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_goes_on_along_the_same_path(options, flatten, tmp_path):
    """torch makes a missing state by a step with lr = 0 and zero gradients, and then loads into it."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as torchs

    asked = torchs.StateDictOptions(flatten_optimizer_state_dict=flatten)
    run, resumed, fresh = (Run(**options) for _ in range(3))
    start = flat(run.model)
    torchs.get_optimizer_state_dict(run.model, run.optimizer)
    assert torch.equal(flat(run.model), start)

    run.advance(3)
    state = torchs.get_optimizer_state_dict(run.model, run.optimizer, options=asked)
    with warnings.catch_warnings():  # torch warns about a single process
        warnings.simplefilter("ignore")
        checkpoint.save({"optimizer": state}, checkpoint_id=tmp_path)

    # The checkpoint is loaded from memory, and from a file into the state that torch makes.
    for other, loaded in ((resumed, copy.deepcopy(state)), (fresh, None)):
        other.model.load_state_dict(run.model.state_dict())
        other.optimizer.anchors.load_state_dict(run.optimizer.anchors.state_dict())
        if loaded is None:
            loaded = torchs.get_optimizer_state_dict(other.model, other.optimizer, options=asked)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                checkpoint.load({"optimizer": loaded}, checkpoint_id=tmp_path)
        torchs.set_optimizer_state_dict(other.model, other.optimizer, loaded, options=asked)
    run.advance(2)
    for other in (resumed, fresh):
        other.advance(2)
        assert same(run.model, other.model)
        assert run.optimizer.last_step == other.optimizer.last_step


def test_a_state_has_the_keys_of_its_options_and_a_velocity_takes_no_memory():
    task = Task()
    optimizer = FIPOptimizer(
        task.model.parameters(), task.anchors(), momentum=0.9, precondition="adam"
    )
    optimizer.step(task.closure(optimizer))
    keys = {"step", "exp_avg", "exp_avg_weight", "exp_avg_sq", "velocity"}
    for state in optimizer.state.values():
        assert state.keys() == keys
        assert state["velocity"].untyped_storage().nbytes() == state["velocity"].element_size()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for state in optimizer.state.values():
        assert state["velocity"].untyped_storage().nbytes() == state["velocity"].element_size()


def test_a_step_of_length_zero_only_initialises_the_state():
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors(), momentum=0.9, eps=0.0)
    optimizer.step(task.closure(optimizer))
    assert len(optimizer.state) == len(list(task.model.parameters()))
    for state in optimizer.state.values():
        assert float(state["step"]) == 0
        assert not state["exp_avg"].any()


# --- states that are not this optimizer's ----------------------------------------------------------------


@pytest.mark.parametrize("theirs", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("steps", [0, 2])
def test_state_of_another_optimizer_is_refused(theirs, steps):
    task = Task()
    ours = FIPOptimizer(task.model.parameters(), task.anchors(), momentum=0.9)
    ours.step(task.closure(ours))
    other = theirs(task.model.parameters(), lr=0.5)
    for _ in range(steps):
        other.step(task.closure(other))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=r"^state_dict: group 0 lacks .*not the state of a FIPOpt"):
        ours.load_state_dict(other.state_dict())
    assert_same_state(ours.state_dict(), before)
    ours.step(task.closure(ours))


def entry(name, change):
    def broken(state):
        state["state"][0][name] = change(state["state"][0].get(name))
        return state

    return broken


def option(name, value):
    def broken(state):
        state["param_groups"][0][name] = value
        return state

    return broken


BROKEN = {
    "mean of another shape": (entry("exp_avg", lambda x: x[:1]), "'exp_avg'"),
    "mean of NaN": (entry("exp_avg", lambda x: x * math.nan), "'exp_avg'"),
    "mean is a number": (entry("exp_avg", lambda x: 1.0), "'exp_avg'"),
    "step of two numbers": (entry("step", lambda x: torch.ones(2)), "'step'"),
    "step is a text": (entry("step", lambda x: "3"), "'step'"),
    "another entry": (entry("momentum_buffer", lambda x: torch.ones(1)), "momentum_buffer"),
    "lr below zero": (option("lr", -1.0), "lr: must be finite"),
    "beta is none": (option("beta", None), "beta: must be a number"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_state_is_refused_whole(name):
    broken, message = BROKEN[name]
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors(), momentum=0.9)
    optimizer.step(task.closure(optimizer))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"^state_dict: .*{message}"):
        optimizer.load_state_dict(broken(copy.deepcopy(before)))
    assert_same_state(optimizer.state_dict(), before)


def assert_same_state(a, b):
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert a["param_groups"] == b["param_groups"]


@configurations
def test_a_reference_taken_from_the_resumed_network_is_refused(options):
    """Lightning's configure_optimizers and from_pretrained(checkpoint) would take the reference from that network."""
    run = Run(**options)
    run.advance(3)
    saved = {"model": run.model.state_dict(), "anchors": run.optimizer.anchors.state_dict()}
    saved = copy.deepcopy(saved | {"optimizer": run.optimizer.state_dict()})
    drift = run.optimizer.anchors.drift()
    assert drift > 0

    other = Run(**options)
    other.model.load_state_dict(saved["model"])
    other.optimizer.anchors.refresh()  # these are the anchors that would be built now
    before = copy.deepcopy(other.optimizer.state_dict())
    with pytest.raises(
        ValueError, match=r"^state_dict: .*other reference .*anchors.load_state_dict"
    ):
        other.optimizer.load_state_dict(saved["optimizer"])
    assert_same_state(other.optimizer.state_dict(), before)

    other.optimizer.anchors.load_state_dict(saved["anchors"])
    other.optimizer.load_state_dict(saved["optimizer"])
    assert other.optimizer.anchors.drift() == drift


def test_the_saved_reference_includes_anchors_added_later():
    run = Run()
    run.advance(1)
    run.optimizer.anchors.extend(run.task.x)
    state = copy.deepcopy(run.optimizer.state_dict())
    for _ in range(2):  # torch adds to the defaults as it loads
        run.optimizer.load_state_dict(state)
    fewer = Run()
    with pytest.raises(ValueError, match="^state_dict: .*other reference"):
        fewer.optimizer.load_state_dict(state)


def test_state_of_another_shape_is_refused():
    small, large = Task(), Task()
    one = FIPOptimizer(small.model.body.parameters(), small.anchors())
    two = FIPOptimizer(large.model.parameters(), large.anchors())
    two.step(large.closure(two))
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        one.load_state_dict(two.state_dict())
    assert one.state_dict() == before


def test_optimizer_is_freed_without_the_collector():
    """The optimizer holds the anchors; in a notebook, `del optimizer` should free their memory."""
    task = Task()
    optimizer = FIPOptimizer(task.model.parameters(), task.anchors())
    for _ in range(2):
        optimizer.step(task.closure(optimizer))
    dead = weakref.ref(optimizer), weakref.ref(optimizer.anchors)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert [ref() for ref in dead] == [None, None]
    finally:
        gc.enable()
